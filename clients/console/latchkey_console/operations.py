"""The operators' view: finds tokens of all accounts, and shows the audit log and the servers.

It reads only. Its caller in the policy needs the role `operator` and no other.
"""

import logging
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final
from urllib.parse import urlencode

import latchkey
from latchkey_coherence.identifiers import TOKEN_ID
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from latchkey_console.failures import Trouble, trouble
from latchkey_console.identity import Identity, Viewer
from latchkey_console.protection import Seals, session_id
from latchkey_console.rendering import Renderer

__all__ = ["Operations", "state_of"]

_log = logging.getLogger("latchkey.console")

# A part of an id that was copied. Hints differ from it: they contain an ellipsis.
PART_OF_ID: Final = re.compile(r"tok_[0-9A-Za-z]+")
# The service's limits: the last characters of a secret, and a whole hint.
HINT_LENGTHS: Final = range(4, 17)
ROWS: Final = 50
# Entries of the audit log on a token's page, and how many it reads for them, in pages. Each visit
# of the page leaves entries itself, which would soon displace all others.
RECENT: Final = 10
RECENT_READ: Final = 200
RECENT_PAGES_MAX: Final = 5
_VISITS: Final = frozenset({"/latchkey.v1.TokenService/Find", "/latchkey.v1.AuditService/List"})
# Calls that find no token: each page of a whole hint may be empty.
SEARCHES_MAX: Final = 5
# The maximum lengths of a filter and of a page token. The service refuses longer ones.
_FIELD_LENGTH_MAX: Final = 128
_PAGE_TOKEN_LENGTH_MAX: Final = 300
_OUTCOMES: Final = {outcome.value: outcome for outcome in latchkey.Outcome} | {"": None}
_FILTERS: Final = ("account", "token", "caller", "method")
_MISTAKE: Final = (
    "This is neither a token ID nor the end of a secret. Enter a token ID, or the last four "
    "characters of a secret, as lists show them. Never enter a whole secret."
)


class Operations:
    """Handles the requests. Raises NotSignedIn and Refused, which the application handles."""

    def __init__(
        self,
        client: latchkey.Client,
        identity: Identity,
        seals: Seals,
        renderer: Renderer,
        now: Callable[[], datetime],
    ) -> None:
        self._client = client
        self._identity = identity
        self._seals = seals
        self._renderer = renderer
        self._now = now

    def routes(self) -> list[Route]:
        """Return the routes of these pages."""
        return [
            Route("/", self.search),
            Route("/token", self.token),
            Route("/audit", self.audit),
            Route("/servers", self.servers),
        ]

    async def search(self, request: Request) -> Response:
        """Find tokens by the end of a secret, or go to the token with an id."""
        viewer = self._viewer(request)
        query = request.query_params
        text = query.get("q", "").strip()
        values: dict[str, Any] = {"text": "", "found": None, "mistake": "", "next": ""}
        if TOKEN_ID.fullmatch(text):
            return self._renderer.redirect(f"/token?{urlencode({'id': text})}")
        if not text:
            return self._page(request, viewer, "search", values)
        if len(text) not in HINT_LENGTHS or PART_OF_ID.fullmatch(text):
            # Does not repeat the text, which may be a secret.
            return self._page(request, viewer, "search", values | {"mistake": _MISTAKE}, 422)
        values["text"] = text
        position = query.get("page", "")[:_PAGE_TOKEN_LENGTH_MAX]
        try:
            page = await self._client.find(hint=text, page_size=ROWS, page_token=position)
            for _ in range(SEARCHES_MAX - 1):
                if page.tokens or not page.next_page_token:
                    break
                page = await self._client.find(
                    hint=text, page_size=ROWS, page_token=page.next_page_token
                )
        except latchkey.InvalidArgument:
            return self._page(request, viewer, "search", values | {"mistake": _MISTAKE}, 422)
        except latchkey.LatchkeyError as error:
            return self._failed(request, viewer, "search", values, error)
        if page.next_page_token:
            values["next"] = f"/?{urlencode({'q': text, 'page': page.next_page_token})}"
        return self._page(request, viewer, "search", values | {"found": page.tokens})

    async def token(self, request: Request) -> Response:
        """Show a token, who uses it, and the newest calls about it."""
        viewer = self._viewer(request)
        token_id = request.query_params.get("id", "")
        values: dict[str, Any] = {"found": None, "callers": (), "entries": None}
        if not TOKEN_ID.fullmatch(token_id):
            return self._page(request, viewer, "token", values, 404)
        try:
            page = await self._client.find(token_id=token_id)
        except latchkey.LatchkeyError as error:
            return self._failed(request, viewer, "token", values, error)
        if not page.tokens:
            return self._page(request, viewer, "token", values, 404)
        (values["found"],), values["callers"] = page.tokens, page.callers
        try:
            values["entries"] = await self._recent_calls(token_id)
        except latchkey.LatchkeyError as error:
            # The rest is worth showing.
            _log.info("audit entries are not shown: %s", error.code.name)
        return self._page(request, viewer, "token", values)

    async def _recent_calls(self, token_id: str) -> list[latchkey.AuditEntry]:
        """Return the newest calls about a token, except those that this view itself makes."""
        calls: list[latchkey.AuditEntry] = []
        wanted, position = latchkey.AuditFilter(token_id=token_id), ""
        for _ in range(RECENT_PAGES_MAX):
            page = await self._client.audit_page(wanted, page_size=RECENT_READ, page_token=position)
            calls += [entry for entry in page.entries if entry.method not in _VISITS]
            position = page.next_page_token
            if not position or len(calls) >= RECENT:
                break
        return calls[:RECENT]

    async def audit(self, request: Request) -> Response:
        """Show the entries of the audit log that match, newest first."""
        viewer = self._viewer(request)
        query = request.query_params
        chosen = {name: query.get(name, "").strip()[:_FIELD_LENGTH_MAX] for name in _FILTERS}
        outcome = query.get("outcome", "")
        outcome = outcome if outcome in _OUTCOMES else ""
        chosen["outcome"] = outcome
        position = query.get("page", "")[:_PAGE_TOKEN_LENGTH_MAX]
        values: dict[str, Any] = {"chosen": chosen, "entries": None, "next": "", "first": ""}
        wanted = latchkey.AuditFilter(
            account_id=chosen["account"],
            token_id=chosen["token"],
            caller=chosen["caller"],
            method=chosen["method"],
            outcome=_OUTCOMES[outcome],
        )
        given = {name: value for name, value in chosen.items() if value}
        try:
            page = await self._client.audit_page(wanted, page_size=ROWS, page_token=position)
        except latchkey.InvalidArgument as error:
            problems = "; ".join(f"{v.field} {v.description}" for v in error.field_violations)
            message = Trouble(422, "The filter is not valid", f"{problems}.")
            return self._page(request, viewer, "audit", values | {"trouble": message}, 422)
        except latchkey.LatchkeyError as error:
            return self._failed(request, viewer, "audit", values, error)
        if page.next_page_token:
            values["next"] = f"/audit?{urlencode(given | {'page': page.next_page_token})}"
        if position:
            values["first"] = f"/audit?{urlencode(given)}" if given else "/audit"
        return self._page(request, viewer, "audit", values | {"entries": page.entries})

    async def servers(self, request: Request) -> Response:
        """Show the server processes, their leases, positions and lags."""
        viewer = self._viewer(request)
        try:
            status = await self._client.status()
        except latchkey.LatchkeyError as error:
            return self._failed(request, viewer, "servers", {"status": None}, error)
        return self._page(request, viewer, "servers", {"status": status})

    def _viewer(self, request: Request) -> Viewer:
        viewer = self._identity.viewer(request)
        latchkey.current_person.set(viewer.person or None)
        return viewer

    def _failed(
        self,
        request: Request,
        viewer: Viewer,
        view: str,
        values: Mapping[str, Any],
        error: latchkey.LatchkeyError,
    ) -> Response:
        message = trouble(error)
        if isinstance(error, latchkey.PermissionDenied):
            message = Trouble(
                403,
                "The service does not let this page do that",
                "In the policy, give this page's caller the role “operator”, for all accounts.",
                error.request_id,
            )
        _log.warning("%s failed: %s", view, error.code.name)
        return self._page(request, viewer, view, {**values, "trouble": message}, message.status)

    def _page(
        self,
        request: Request,
        viewer: Viewer,
        view: str,
        values: Mapping[str, Any],
        status: int = 200,
    ) -> Response:
        context = {
            "viewer": viewer,
            "csrf": self._seals.csrf(session_id(request), viewer.account_id),
            "now": self._now(),
            "view": view,
            "trouble": None,
            "state_of": state_of,
            **values,
        }
        return self._renderer.view(f"operators/{view}.html", context, status)


def state_of(found: latchkey.FoundToken, now: datetime) -> str:
    """Return the state of a token in one word."""
    token = found.token
    if found.delete_time is not None:
        return "Deleted"
    if token.disable_time is not None:
        return "Disabled"
    if token.expire_time is not None and token.expire_time <= now:
        return "Expired"
    return "Active"
