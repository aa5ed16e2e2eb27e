"""Who is looking: the account whose tokens a request may see.

Three ways, one of which the settings choose: a fixed account on loopback, a header from a trusted
sign-in proxy, OpenID Connect (`openid`). None ever falls back to another, and a request that does
not say beyond doubt whose it is sees nothing.
"""

from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Final, Protocol

from starlette.requests import Request

from latchkey_console.settings import ProxySettings, is_account_id

__all__ = ["FixedAccount", "Identity", "NotSignedIn", "ProxyHeader", "Refused", "Viewer"]

# What a proxy adds to the requests that it passes on.
_FORWARDED: Final = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip")


@dataclass(frozen=True, slots=True)
class Viewer:
    """Whose tokens are shown, and whether this page signs in and out by itself."""

    account_id: str
    can_sign_out: bool = False


class NotSignedIn(Exception):
    """Signing in would help."""


class Refused(Exception):
    """This request sees nothing. `title` and `text` are for a page, and quote nothing of it."""

    def __init__(self, status: int, title: str, text: str) -> None:
        super().__init__(title)
        self.status = status
        self.title = title
        self.text = text


class Identity(Protocol):
    """One way to know who is looking."""

    def viewer(self, request: Request) -> Viewer:
        """Return whose tokens the request may see. Raises NotSignedIn and Refused."""


class FixedAccount:
    """Everyone is the same account: for trying the page, on loopback."""

    def __init__(self, account_id: str) -> None:
        self._viewer = Viewer(account_id)

    def viewer(self, request: Request) -> Viewer:
        """Return the account. Raises Refused for what comes through a proxy.

        The settings keep the address to loopback; a proxy on this machine would open it again, to
        everyone as this account.
        """
        if any(name in request.headers for name in _FORWARDED):
            raise Refused(
                403,
                "Not through a proxy",
                "This page was started with --account, which lets everyone in. Behind a proxy, "
                "start it with --account-header or --oidc-issuer.",
            )
        return self._viewer


class ProxyHeader:
    """A sign-in proxy in front says in a header whose request it is, as oauth2-proxy does."""

    def __init__(self, settings: ProxySettings) -> None:
        self._header = settings.header
        self._trusted = settings.trusted

    def viewer(self, request: Request) -> Viewer:
        """Return the account that the header names. Raises Refused.

        The address is the connection's own, never one that a header claims.
        """
        if not self._is_trusted(request.client.host if request.client else ""):
            raise Refused(
                403,
                "Not through the sign-in proxy",
                "This page answers its sign-in proxy alone. Use the address that you were given.",
            )
        values = request.headers.getlist(self._header)
        if not values or not values[0]:
            raise Refused(
                401,
                "Nobody is signed in",
                "The sign-in proxy did not say who you are. Sign in there and come back.",
            )
        # Two values: one may be the caller's own, and which one is not to be told.
        if len(values) > 1 or not is_account_id(values[0]):
            raise Refused(
                403,
                "This is not an account",
                "What the sign-in proxy said is not one account id of Latchkey, which has 1-64 "
                "characters of A-Za-z0-9._:- (so no mail address). Whoever runs this page has to "
                "see to that.",
            )
        return Viewer(values[0])

    def _is_trusted(self, host: str) -> bool:
        try:
            address = ip_address(host)
        except ValueError:
            return False
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return any(address in network for network in self._trusted)
