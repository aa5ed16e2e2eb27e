"""The console's cookies: their names, where browsers send them, and how their values are sealed."""

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal, cast

from itsdangerous import BadSignature, TimestampSigner
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from latchkey_console.state import Box, StateKeys

__all__ = ["CookieRules", "SealedCookie", "Sessions", "fits"]

# Browsers silently drop a cookie whose name and value are longer than 4,096 bytes.
VALUE_LENGTH_MAX: Final = 3_900


@dataclass(frozen=True, slots=True)
class CookieRules:
    """What all cookies of a console have in common."""

    name: str
    """The session's cookie. The names of the others begin with it."""
    path: str
    secure: bool
    framed: bool = False
    """Whether pages of other sites may frame the console, over TLS."""

    @property
    def same_site(self) -> Literal["lax", "none"]:
        """The attribute SameSite.

        Not strict: the sign-in provider's redirect to this page comes from another site.
        """
        return "none" if self.framed else "lax"

    def set(
        self, response: Response, suffix: str, value: str, max_age: int, below: str = ""
    ) -> None:
        """Set the cookie whose name has this suffix. `below` restricts it to a path."""
        # Not Response.set_cookie, which has Partitioned only with Python 3.14.
        parts = [
            f"{self.name}{suffix}={value}",
            f"Max-Age={max_age}",
            f"Path={self._path(below)}",
            "HttpOnly",
            f"SameSite={self.same_site}",
        ]
        if self.secure:
            parts.append("Secure")
        if self.framed:
            # Other sites that frame this page share no cookies with each other (CHIPS).
            parts.append("Partitioned")
        response.headers.append("set-cookie", "; ".join(parts))

    def delete(self, response: Response, suffix: str, below: str = "") -> None:
        """Delete a cookie."""
        self.set(response, suffix, "", 0, below)

    def read(self, request: Request, suffix: str) -> str:
        """Return a cookie's value, or an empty text."""
        return request.cookies.get(f"{self.name}{suffix}", "")

    def _path(self, below: str) -> str:
        return f"{self.path.rstrip('/')}{below}" if below else self.path


class SealedCookie:
    """A cookie that only the console can read and write, for one session and account."""

    def __init__(
        self,
        rules: CookieRules,
        suffix: str,
        keys: StateKeys,
        age_max_seconds: float,
        now: Callable[[], datetime],
        below: str = "",
    ) -> None:
        self._rules = rules
        self._suffix = suffix
        self._box = keys.box(f"cookie {suffix}", now)
        self._age_max_seconds = age_max_seconds
        self._below = below

    def write(self, response: Response, owner: str, value: Mapping[str, Any]) -> bool:
        """Store a value for `owner` in the browser. Return whether it fits into a cookie."""
        sealed = self._box.seal({"owner": owner, "value": value})
        if len(sealed) > VALUE_LENGTH_MAX:
            return False
        age = int(self._age_max_seconds)
        self._rules.set(response, self._suffix, sealed, age, self._below)
        return True

    def read(self, request: Request, owner: str) -> dict[str, Any]:
        """Return the value that was stored for `owner`, or an empty one."""
        opened = self._box.open(self.raw(request), self._age_max_seconds)
        value: dict[str, Any] = opened["value"] if opened.get("owner") == owner else {}
        return value

    def raw(self, request: Request) -> str:
        """Return the sealed value, or an empty text."""
        return self._rules.read(request, self._suffix)

    def delete(self, request: Request, response: Response) -> None:
        """Delete the cookie if the request has it."""
        if self.raw(request):
            self._rules.delete(response, self._suffix, self._below)


class Sessions(SessionMiddleware):
    """Starlette's sessions in a cookie, but encrypted, and with keys that can change."""

    def __init__(self, app: ASGIApp, rules: CookieRules, box: Box, max_age: float) -> None:
        super().__init__(
            app,
            secret_key="",
            session_cookie=rules.name,
            max_age=int(max_age),
            path=rules.path,
            same_site=rules.same_site,
            https_only=rules.secure,
            partitioned=rules.framed,
        )
        # Starlette calls only these two methods.
        self.signer = cast("TimestampSigner", _Seal(box))


def fits(box: Box, session: Mapping[str, Any]) -> bool:
    """Return whether a session fits into a cookie."""
    return len(box.seal({"session": json.dumps(session)})) <= VALUE_LENGTH_MAX


class _Seal:
    """Stands in for the signer of Starlette's sessions, which passes JSON in base64."""

    def __init__(self, box: Box) -> None:
        self._box = box

    def sign(self, value: bytes) -> bytes:
        """Return the sealed session."""
        sealed = self._box.seal({"session": b64decode(value).decode()})
        if len(sealed) > VALUE_LENGTH_MAX:
            # A browser would drop it, and its visitor could never sign in.
            raise ValueError("the session is too large for a cookie")
        return sealed.encode()

    def unsign(self, value: bytes, max_age: int) -> bytes:
        """Return the session. Raises BadSignature."""
        opened = self._box.open(value.decode("ascii", "replace"), max_age)
        if "session" not in opened:
            raise BadSignature("not sealed by this console")
        return b64encode(str(opened["session"]).encode())
