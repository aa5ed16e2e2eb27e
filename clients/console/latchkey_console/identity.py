"""Identifies the visitor: the account whose tokens a request may see.

The settings choose one of three ways: a fixed account on loopback, a header from a trusted sign-in
proxy, or OpenID Connect (`openid`). There is no fallback from one way to another. A request that
does not clearly identify its account is rejected.
"""

from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Final, Protocol
from urllib.parse import urlencode

from starlette.requests import Request

from latchkey_console.settings import ProxySettings, is_account_id

__all__ = [
    "FixedAccount",
    "Identity",
    "NotSignedIn",
    "ProxyHeader",
    "Refused",
    "Viewer",
    "invalid_account_id",
]

# Headers that proxies add to the requests they forward.
_FORWARDED: Final = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip")


@dataclass(frozen=True, slots=True)
class Viewer:
    """The account whose tokens are shown, and whether this page handles the sign-out."""

    account_id: str
    can_sign_out: bool = False
    person: str = ""
    """The visitor's own name, for the audit log of Latchkey."""
    accounts: tuple[str, ...] | None = None
    """The accounts among which the visitor chooses (`accounts`). None: there is only one."""

    @property
    def query(self) -> str:
        """The query string of the list, which names the account if the visitor has several."""
        return f"?{urlencode({'account': self.account_id})}" if self.in_url else ""

    @property
    def in_url(self) -> str:
        """The account as each URL and each form names it, or an empty text."""
        return self.account_id if self.accounts is not None else ""


class NotSignedIn(Exception):
    """The visitor must sign in first. The page shows the text, if there is one."""


class Refused(Exception):
    """The request is refused. The page shows `title` and `text`, which never quote the request.

    `action` is the text and the URL of a link.
    """

    def __init__(
        self, status: int, title: str, text: str, action: tuple[str, str] | None = None
    ) -> None:
        super().__init__(title)
        self.action = action
        self.status = status
        self.title = title
        self.text = text


def invalid_account_id(mistake: str) -> Refused:
    """Return the error for a visitor whose account id is not valid."""
    return Refused(
        403,
        "Invalid account ID",
        f"{mistake} An account ID consists of 1-128 characters from "
        "A-Za-z0-9._:@|+=/~-. Ask your administrator to fix this.",
    )


class Identity(Protocol):
    """One way to identify visitors."""

    def viewer(self, request: Request) -> Viewer:
        """Return the account that the request may see. Raises NotSignedIn and Refused."""


class FixedAccount:
    """Treats everyone as the same account, to try the page on loopback."""

    def __init__(self, account_id: str) -> None:
        self._viewer = Viewer(account_id)

    def viewer(self, request: Request) -> Viewer:
        """Return the account. Raises Refused if the request came through a proxy.

        The settings restrict the address to loopback. A proxy on this machine would let everyone
        act as this account.
        """
        if any(name in request.headers for name in _FORWARDED):
            raise Refused(
                403,
                "This page does not work behind a proxy",
                "It was started with --account, which lets everyone in. To run it behind a proxy, "
                "start it with --account-header or --oidc-issuer.",
            )
        return self._viewer


class ProxyHeader:
    """Trusts a sign-in proxy such as oauth2-proxy, which sends the account in a header."""

    def __init__(self, settings: ProxySettings) -> None:
        self._header = settings.header
        self._person_header = settings.person_header
        self._trusted = settings.trusted
        self.operators = settings.operators

    def viewer(self, request: Request) -> Viewer:
        """Return the account that the header names. Raises Refused."""
        value = self.value(request, "The sign-in proxy did not send a single valid account ID.")
        if not value:
            raise self.nobody()
        if not is_account_id(value):
            raise invalid_account_id("The sign-in proxy did not send a single valid account ID.")
        return Viewer(value, person=self.person(request) or value)

    def value(self, request: Request, several: str) -> str:
        """Return the header's value. Raises Refused, with the text `several` if there are two.

        Trust depends on the connection's own address, never on one that a header claims.
        """
        if not self._is_trusted(request.client.host if request.client else ""):
            raise Refused(
                403,
                "Use the sign-in proxy",
                "This page only answers its sign-in proxy. Use the address that you were given.",
            )
        values = request.headers.getlist(self._header)
        if not values:
            raise self.nobody()
        # With two values, one may come from the caller, and we cannot know which.
        if len(values) > 1:
            raise invalid_account_id(several)
        return values[0]

    def nobody(self) -> Refused:
        """Return the error for a request that names no visitor."""
        return Refused(
            401,
            "You are not signed in",
            "The sign-in proxy did not say who you are. Sign in there and come back.",
        )

    def person(self, request: Request) -> str:
        """Return the name in the header for people, or "" if it has none, or several."""
        names = [] if self._person_header is None else request.headers.getlist(self._person_header)
        return names[0].strip() if len(names) == 1 else ""

    def _is_trusted(self, host: str) -> bool:
        try:
            address = ip_address(host)
        except ValueError:
            return False
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return any(address in network for network in self._trusted)
