"""What every page needs: the visit, the list around a dialog, and the notice after a change.

`pages` and `lifecycle` handle the requests with it.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any, Final

import latchkey
from starlette.requests import Request
from starlette.responses import Response

from latchkey_console import listing
from latchkey_console.accounts import choose
from latchkey_console.cookies import CookieRules, SealedCookie
from latchkey_console.failures import Trouble, trouble
from latchkey_console.forms import BODY_BYTES_MAX
from latchkey_console.identity import Identity, Refused, Viewer
from latchkey_console.listing import ROWS_MAX, Filter, Listed
from latchkey_console.packing import pack_receipt, unpack_receipt
from latchkey_console.protection import BadForm, Seals, read_form, session_id
from latchkey_console.rendering import Renderer, is_part
from latchkey_console.review import Finding, Kind
from latchkey_console.reviewed import Reviewed
from latchkey_console.state import StateKeys

__all__ = ["Frame", "Notice", "Visit", "read_fields", "rows_context", "unchanged"]

_log = logging.getLogger("latchkey.console")

# A notice is shown right after a redirect, so nobody needs it for longer.
NOTICE_SECONDS: Final = 120


@dataclass(frozen=True, slots=True)
class Notice:
    """The result of a change, shown once on the next page."""

    kind: str
    """deleted, several-deleted, unconfirmed, gone, disabled, enabled, updated or retired"""
    token_id: str
    name: str
    scope: str = ""
    milliseconds: int = 0
    receipt: latchkey.Receipt | None = None
    count: int = 0
    """Of several tokens."""
    asked: int = 0
    """How many of them the visitor selected."""


@dataclass(frozen=True, slots=True)
class Visit:
    """The visitor, the session, and the part of the list that a request asks for."""

    viewer: Viewer
    session: str
    filter: Filter
    reviewed: Mapping[Kind, int] = field(default_factory=dict)
    """The kinds of findings that the visitor is done with, and how many tokens had them then."""

    @property
    def account_id(self) -> str:
        """The account whose tokens the visitor sees."""
        return self.viewer.account_id

    @property
    def owner(self) -> str:
        """Who may see the results of this visit: this session, while it has this account."""
        return f"{self.session} {self.account_id}"


class Frame:
    """Draws the list, dialogs over it, and messages. Shared by all pages."""

    def __init__(
        self,
        client: latchkey.Client,
        identity: Identity,
        seals: Seals,
        renderer: Renderer,
        rules: CookieRules,
        keys: StateKeys,
        now: Callable[[], datetime],
        monotonic: Callable[[], float],
    ) -> None:
        self.client = client
        self.seals = seals
        self.renderer = renderer
        self.reviewed = Reviewed(rules)
        self.now = now
        self.monotonic = monotonic
        self._identity = identity
        self._notices = SealedCookie(rules, "-notice", keys, NOTICE_SECONDS, now)

    def visit(self, request: Request, query: Mapping[str, str]) -> Visit:
        """Return the visit. From now on, the client makes calls on behalf of its person.

        Raises NotSignedIn, NotChosen and Refused.
        """
        viewer = choose(self._identity.viewer(request), query.get("account", ""))
        latchkey.current_person.set(viewer.person or None)
        reviewed = self.reviewed.read(request, viewer.account_id, self.now())
        wanted = replace(Filter.read(query), account=viewer.in_url)
        return Visit(viewer, session_id(request), wanted, reviewed)

    def visitor(self, request: Request) -> tuple[Viewer, str]:
        """Return the visitor, who has not chosen an account yet, and the seal for forms.

        Raises NotSignedIn and Refused.
        """
        viewer = self._identity.viewer(request)
        return viewer, self.seals.csrf(session_id(request), "")

    def is_ours(self, fields: Mapping[str, str], visit: Visit) -> bool:
        """Return whether a form of this session and account sent the fields."""
        return self.seals.is_csrf(fields.get("csrf", ""), visit.session, visit.account_id)

    def mark(self, fields: Mapping[str, str], visit: Visit) -> str | None:
        """Return the mark of one of our forms, or None if it has expired or is not ours."""
        if not self.is_ours(fields, visit):
            return None
        return self.seals.form(fields.get("form", ""), visit.session, visit.account_id)

    def new_mark(self, visit: Visit) -> str:
        """Return a mark for a new form."""
        return self.seals.new_form(visit.session, visit.account_id)

    def redirect(self, path: str) -> Response:
        """Return a redirect to a path of the page."""
        return self.renderer.redirect(path)

    def done(self, visit: Visit, notice: Notice) -> Response:
        """Return the redirect to the list, on which the visitor sees a notice once."""
        response = self.redirect(f"/{visit.filter.query}")
        packed = {**asdict(notice), "receipt": pack_receipt(notice.receipt)}
        self._notices.write(response, visit.owner, packed)
        return response

    async def limits(self, visit: Visit) -> latchkey.Limits:
        """Return the limits for the account's tokens, so that forms offer only what is allowed.

        Without an answer, forms offer everything: the service has the final say. An older server
        does not know the question, and a policy may forbid it.
        """
        try:
            return await self.client.get_limits(visit.account_id)
        except latchkey.LatchkeyError as error:
            _log.info("limits are not known: %s", error.code.name)
            return latchkey.Limits()

    async def list(self, request: Request, visit: Visit, notice: Notice | None = None) -> Response:
        """Return the list, with the notice that the previous request left."""
        context = await self._context(visit)
        left = self._notices.read(request, visit.owner)
        if notice is None and left:
            notice = Notice(**{**left, "receipt": unpack_receipt(left["receipt"])})
        context["notice"] = notice
        message: Trouble | None = context["trouble"]
        response = self.renderer.page(request, context, message.status if message else 200)
        # A request that was sent before a change does not carry the notice of the change, so it
        # cannot remove it.
        self._notices.delete(request, response)
        return response

    async def dialog(
        self,
        request: Request,
        visit: Visit,
        dialog: str,
        values: Mapping[str, Any],
        status: int = 200,
    ) -> Response:
        """Return a dialog: alone for the script, otherwise over the list."""
        context = await self.behind(request, visit)
        return self.renderer.page(request, {**context, **values, "dialog": dialog}, status)

    async def behind(self, request: Request, visit: Visit) -> dict[str, Any]:
        """Return the context behind a dialog. The script already has the list."""
        return self._frame(visit) if is_part(request) else await self._context(visit)

    def message(self, request: Request, visit: Visit, message: Trouble) -> Response:
        """Return a page, or for the script a part, with one message."""
        return self.renderer.message(message, visit.viewer, part=is_part(request))

    def expired(self, request: Request, visit: Visit) -> Response:
        """Return the message for a form of another session, which changed nothing."""
        text = "Nothing was changed. Reload the page and try again."
        return self.message(request, visit, Trouble(403, "This page has expired", text))

    async def token(
        self, request: Request, visit: Visit, token_id: str
    ) -> latchkey.Token | Response:
        """Return the token. If it does not exist or Latchkey fails, return the response instead."""
        try:
            return await self.client.get(visit.account_id, token_id)
        except (latchkey.NotFound, latchkey.InvalidArgument):
            # Deleted elsewhere in the meantime, so there is nothing to do.
            return await self.list(request, visit, Notice("gone", token_id, ""))
        except latchkey.LatchkeyError as error:
            return self.message(request, visit, unchanged(error))

    def milliseconds_since(self, began: float) -> int:
        """Return the time since a request arrived, at least 1 ms.

        Measured on one clock from the request's arrival to Latchkey's answer. By then the change
        was in effect everywhere.
        """
        return max(1, round((self.monotonic() - began) * 1_000))

    def _frame(self, visit: Visit) -> dict[str, Any]:
        """Return the context that every page needs."""
        return {
            "viewer": visit.viewer,
            "csrf": self.seals.csrf(visit.session, visit.account_id),
            "filter": visit.filter,
            "now": self.now(),
            "dialog": None,
            "notice": None,
        }

    async def _context(self, visit: Visit) -> dict[str, Any]:
        """Return the context of the list, or of the error if Latchkey does not provide one."""
        frame = self._frame(visit)
        try:
            listed = await listing.fetch(self.client, visit.account_id, visit.filter, self.now())
        except latchkey.LatchkeyError as error:
            _log.warning("list failed: %s", error.code.name)
            return {**frame, "trouble": trouble(error)}
        return {
            **frame,
            **rows_context(listed, visit.filter),
            "trouble": None,
            **_reviewed(listed.findings, visit.reviewed),
            "total": listed.total,
            "matching": listed.matching,
            **_further(listed, visit.filter),
        }


def rows_context(listed: Listed, wanted: Filter) -> dict[str, Any]:
    """Return the context of the table's rows."""
    return {
        "filter": wanted,
        "now": listed.now,
        "kinds": listed.kinds,
        "use_recorded": listed.use_recorded,
        "rows": listed.rows,
    }


def _reviewed(findings: Sequence[Finding], reviewed: Mapping[Kind, int]) -> dict[str, Any]:
    """Return the findings to show, and those that the visitor is done with.

    Further tokens with a finding bring it back.
    """
    done = [finding for finding in findings if finding.count <= reviewed.get(finding.kind, 0)]
    return {"findings": [found for found in findings if found not in done], "reviewed": done}


def _further(listed: Listed, wanted: Filter) -> dict[str, Any]:
    """Return the addresses of further rows: with the script, and without it."""
    if not listed.following:
        return {"further": None}
    after = wanted.after(listed.following, wanted.at or listed.now)
    # Without the script, the next page repeats these rows, up to a limit. A search that found fewer
    # continues where it ended.
    full = len(listed.rows) == wanted.rows < ROWS_MAX
    whole = wanted.more() if full else after
    anchor = f"#{listed.rows[-1].id}" if whole is not after and listed.rows else ""
    return {"further": {"rows": f"/rows{after.query}", "page": f"/{whole.query}{anchor}"}}


async def read_fields(
    request: Request, repeated: str = "", bytes_max: int = BODY_BYTES_MAX
) -> dict[str, str]:
    """Return the fields of a submitted form, as `read_form` does. Raises Refused."""
    try:
        return await read_form(request, repeated, bytes_max)
    except BadForm:
        raise Refused(400, "Invalid form", "Nothing was changed. Go back and try again.") from None


def unchanged(error: latchkey.LatchkeyError) -> Trouble:
    """Return the message for an error before or instead of a change."""
    message = trouble(error)
    return Trouble(
        message.status,
        message.title,
        f"Nothing was changed. {message.text}",
        message.request_id,
        message.retry_seconds,
    )
