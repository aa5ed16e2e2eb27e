"""Sign-in with OpenID Connect: authorization code flow, with state, nonce and PKCE.

Authlib implements the protocol. A sign-in is part of the sealed session cookie, so that any
process of the console can read it. Signing out deletes the cookie, and ends the session for every
copy of it (`ended`).
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final

import httpx2
from authlib.common.errors import AuthlibBaseError
from authlib.integrations.starlette_client import OAuth
from joserfc.errors import JoseError
from starlette.requests import Request
from starlette.responses import Response

from latchkey_console.accounts import accounts_of
from latchkey_console.cookies import CookieRules, SealedCookie, fits
from latchkey_console.ended import Ended, Peers
from latchkey_console.groups import is_member
from latchkey_console.identity import NotSignedIn, Refused, Viewer, invalid_account_id
from latchkey_console.operators import not_an_operator
from latchkey_console.protection import new_session, session_id
from latchkey_console.settings import OpenIdSettings, is_account_id
from latchkey_console.state import StateKeys

__all__ = ["SIGN_OUT", "OpenId"]

_log = logging.getLogger("latchkey.console")

# A working day. The provider's own session usually reduces the next sign-in to a redirect.
SIGN_IN_SECONDS: Final = 8 * 3_600.0
# For each request to the provider; a sign-in needs up to four.
PROVIDER_SECONDS: Final = 5.0
# The tolerated difference between the provider's clock and ours.
LEEWAY_SECONDS: Final = 60
# Real names are shorter. The bound matters because the session has to fit into a cookie.
PERSON_LENGTH_MAX: Final = 256
SIGN_OUT: Final = "/sign-out"


@dataclass(frozen=True, slots=True)
class _SignIn:
    """A sign-in, as the session stores it under "sign_in"."""

    account_id: str
    accounts: tuple[str, ...] | None
    person: str
    until: int
    """When it ends, in seconds since 1970."""

    @property
    def whose(self) -> str:
        """The accounts, for the log, or an operator's name."""
        accounts = self.accounts or (self.account_id,)
        return f"account {', '.join(accounts)}" if any(accounts) else f"operator {self.person}"


class OpenId:
    """Identifies visitors by their sign-in with the provider."""

    def __init__(
        self,
        settings: OpenIdSettings,
        home_url: str,
        rules: CookieRules,
        keys: StateKeys,
        ended: Ended,
        peers: Peers,
        now: Callable[[], datetime],
    ) -> None:
        self._settings = settings
        self._home_url = home_url
        self._ended = ended
        self._peers = peers
        self._now = now
        self._sessions = keys.box("session", now)
        # The provider's proof of the sign-in, which only the sign-out needs. Some are so large that
        # they need a cookie for themselves.
        self._proof = SealedCookie(rules, "-proof", keys, SIGN_IN_SECONDS, now, below=SIGN_OUT)
        self._provider: Any = OAuth().register(
            "provider",
            client_id=settings.client_id,
            client_secret=settings.client_secret and settings.client_secret.reveal(),
            server_metadata_url=f"{settings.issuer.rstrip('/')}/.well-known/openid-configuration",
            client_kwargs={
                "scope": "openid" if settings.needs_only_the_subject else "openid profile email",
                "code_challenge_method": "S256",
                "timeout": PROVIDER_SECONDS,
                **({} if settings.client_secret else {"token_endpoint_auth_method": "none"}),
            },
        )

    def viewer(self, request: Request) -> Viewer:
        """Return the account that is signed in with this session. Raises NotSignedIn."""
        sign_in = self._sign_in(request)
        if sign_in is None:
            # It has ended, and takes room that the next sign-in needs.
            request.session.pop("sign_in", None)
            raise NotSignedIn
        return Viewer(
            sign_in.account_id,
            can_sign_out=True,
            person=sign_in.person,
            accounts=sign_in.accounts,
        )

    async def begin(self, request: Request) -> Response:
        """Return the redirect to the provider. Raises Refused if it cannot be reached."""
        try:
            await self._check_issuer()
            answer: Response = await self._provider.authorize_redirect(
                request, f"{self._home_url}/signed-in"
            )
        except (AuthlibBaseError, httpx2.HTTPError, ValueError, RuntimeError) as error:
            raise _unreachable(error) from error
        if not fits(self._sessions, request.session):
            # The names of many accounts leave no room. The new sign-in replaces the earlier one.
            request.session.pop("sign_in", None)
        return answer

    async def finish(self, request: Request) -> Callable[[Response], None]:
        """Check the provider's answer and sign the session in. Raises Refused.

        The session gets a new id, which makes an id that an attacker planted worthless. Call the
        result with the response, which then sets a cookie for the sign-out.
        """
        # RFC 9207: if the answer names its issuer, that must be the provider we asked.
        if request.query_params.get("iss", self._settings.issuer) != self._settings.issuer:
            raise _failed("another provider answered")
        if "code" not in request.query_params and "error" not in request.query_params:
            raise _failed("the answer has no code")
        try:
            await self._check_issuer()
            tokens = await self._provider.authorize_access_token(
                request,
                leeway=LEEWAY_SECONDS,
                claims_options={
                    "iss": {"essential": True, "values": [self._settings.issuer]},
                    "aud": {"essential": True, "values": [self._settings.client_id]},
                },
            )
        except httpx2.HTTPError as error:
            raise _unreachable(error) from error
        except (AuthlibBaseError, JoseError, ValueError, RuntimeError, KeyError) as error:
            # Log only the type: some of these errors quote what the other side sent.
            raise _failed(type(error).__name__) from error
        claims = tokens.get("userinfo")
        if not claims:
            raise _failed("the answer has no id token")
        earlier = self._sign_in(request)
        if earlier is not None:
            # Before the claims are checked: if they refuse the visitor, as after the loss of an
            # account or a group, the earlier sign-in must not outlive that.
            await self._peers.end(session_id(request), earlier.until)
            new_session(request)
        account_id, accounts = self._accounts(claims)
        session = new_session(request)
        until = int(self._now().timestamp() + SIGN_IN_SECONDS)
        sign_in = _SignIn(account_id, accounts, _person(claims), until)
        request.session["sign_in"] = asdict(sign_in)
        if not fits(self._sessions, request.session):
            new_session(request)
            _log.warning("sign-in refused: the names of the accounts do not fit into a cookie")
            raise Refused(
                403,
                "Too many accounts",
                "You are signed in, but the names of your accounts are too long for this page. Ask "
                "your administrator for a shorter list.",
            )
        _log.info("signed in: %s", sign_in.whose)

        def remember(response: Response) -> None:
            # If it is too large for a cookie, the provider asks at the sign-out who signs out.
            self._proof.write(response, session, {"id_token": tokens.get("id_token", "")})

        return remember

    def _accounts(self, claims: Mapping[str, Any]) -> tuple[str, tuple[str, ...] | None]:
        """Return the account, or if the provider sends a list, all accounts. Raises Refused."""
        settings = self._settings
        if settings.operators:
            if not is_member(claims.get(settings.groups_claim), settings.operators):
                _log.warning("sign-in refused: %s is not an operator", _person(claims))
                raise not_an_operator()
            return "", None
        if settings.accounts_claim is not None:
            try:
                found = claims.get(settings.accounts_claim, [])
                return "", accounts_of(found, settings.accounts_key)
            except Refused as refused:
                claim = settings.accounts_claim
                _log.warning("sign-in refused: claim %s: %s", claim, refused.title)
                raise
        account_id = claims.get(settings.claim)
        if not isinstance(account_id, str) or not is_account_id(account_id):
            _log.warning("sign-in refused: claim %s is not a valid account id", settings.claim)
            raise invalid_account_id(
                f"You are signed in, but the provider's claim “{settings.claim}” is not a "
                "valid account ID."
            )
        return account_id, None

    async def end(self, request: Request) -> str | None:
        """Sign the session out here and return the provider's sign-out URL, or None without one.

        OpenID Connect RP-Initiated Logout 1.0.
        """
        sign_in, session = self._sign_in(request), session_id(request)
        proof = self._proof.read(request, session)
        new_session(request)
        if sign_in is None:
            return None
        await self._peers.end(session, sign_in.until)
        _log.info("signed out: %s", sign_in.whose)
        try:
            metadata = await self._provider.load_server_metadata()
            if "end_session_endpoint" not in metadata:
                return None
            result = await self._provider.create_logout_url(
                post_logout_redirect_uri=f"{self._home_url}/signed-out",
                id_token_hint=proof.get("id_token") or None,
                client_id=self._settings.client_id,
            )
        except (AuthlibBaseError, httpx2.HTTPError, ValueError, RuntimeError):
            # The provider is unavailable, but the sign-out here is complete.
            return None
        url = str(result["url"])
        return url if url.startswith(("https://", "http://")) else None

    def _sign_in(self, request: Request) -> _SignIn | None:
        """Return the session's sign-in unless it has ended."""
        values = request.session.get("sign_in")
        sign_in = None if values is None else _restored(values)
        if sign_in is None or session_id(request) in self._ended:
            return None
        # The cookie's own age does not count, because it starts again with each change.
        return sign_in if self._now().timestamp() < sign_in.until else None

    async def _check_issuer(self) -> None:
        # Discovery 1.0 §4.3: otherwise one provider could impersonate another.
        metadata = await self._provider.load_server_metadata()
        if metadata.get("issuer") != self._settings.issuer:
            raise ValueError("the provider's metadata names another issuer")


def _restored(values: Mapping[str, Any]) -> _SignIn:
    """Return the sign-in in a session, in which JSON has made lists of tuples."""
    accounts = values["accounts"]
    return _SignIn(**{**values, "accounts": None if accounts is None else tuple(accounts)})


def _person(claims: Mapping[str, Any]) -> str:
    """Return the person's identifier at the provider, which never changes, and their address."""
    subject, email = str(claims.get("sub", "")), claims.get("email")
    known = isinstance(email, str) and email != subject
    return (f"{subject} ({email})" if known else subject)[:PERSON_LENGTH_MAX]


def _unreachable(error: Exception) -> Refused:
    _log.warning("sign-in failed: provider unavailable: %s", type(error).__name__)
    return Refused(
        503,
        "Sign-in is not available",
        "The sign-in provider is not responding correctly. Try again in a moment.",
    )


def _failed(reason: str) -> Refused:
    _log.warning("sign-in failed: %s", reason)
    return Refused(
        400,
        "Sign-in failed",
        "It was cancelled, took too long, or was started in another window. Start again.",
    )
