"""The pages: one method per route, from the request to the response.

Every page works with plain links, forms and redirects. The page's own script sends a header and
receives only the part that it inserts: the list without the frame, or a dialog without the list.
Nothing else differs.
"""

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import latchkey
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from latchkey_console import listing
from latchkey_console.creation import Creations, Different, Lost, Made, NotMade
from latchkey_console.expiring import Expiring
from latchkey_console.failures import Trouble, is_refusal, trouble
from latchkey_console.forms import NewToken, TokenForm
from latchkey_console.identity import Identity, NotSignedIn, Refused, Viewer
from latchkey_console.listing import Filter, Inventory
from latchkey_console.protection import BadForm, Seals, read_form, session_id
from latchkey_console.rendering import Renderer, is_part

__all__ = ["Pages"]

_log = logging.getLogger("latchkey.console")

# A notice is shown right after a redirect, so nobody needs it for longer.
NOTICE_SECONDS: Final = 120.0
NOTICES_MAX: Final = 10_000
# Signing in takes a while if the visitor must reset a password.
DRAFT_SECONDS: Final = 900.0
DRAFTS_MAX: Final = 1_000

_STALE: Final = (
    "This form has expired or belongs to another session. Nothing was created. "
    "Check the form and submit it again."
)


@dataclass(frozen=True, slots=True)
class Notice:
    """The result of a deletion, shown once on the next page."""

    kind: str
    """deleted, unconfirmed or gone"""
    token_id: str
    name: str
    scope: str = ""
    milliseconds: int = 0
    receipt: latchkey.Receipt | None = None


@dataclass(frozen=True, slots=True)
class Visit:
    """The visitor, the session, and the part of the list that a request asks for."""

    viewer: Viewer
    session: str
    filter: Filter

    @property
    def account_id(self) -> str:
        """The account whose tokens the visitor sees."""
        return self.viewer.account_id

    @property
    def owner(self) -> str:
        """Who may see the results of this visit: this session, while it has this account."""
        return f"{self.session} {self.account_id}"


class Pages:
    """Handles the requests. Raises NotSignedIn and Refused, which the application handles."""

    def __init__(
        self,
        client: latchkey.Client,
        identity: Identity,
        seals: Seals,
        renderer: Renderer,
        now: Callable[[], datetime],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._identity = identity
        self._seals = seals
        self._renderer = renderer
        self._now = now
        self._monotonic = monotonic
        self._creations = Creations(client, now, monotonic)
        self._notices: Expiring[Notice] = Expiring(NOTICE_SECONDS, NOTICES_MAX, monotonic)
        self._drafts: Expiring[TokenForm] = Expiring(DRAFT_SECONDS, DRAFTS_MAX, monotonic)

    async def index(self, request: Request) -> Response:
        """Show the list and the notice that the previous request left."""
        return await self._list(request, self._visit(request, request.query_params))

    async def rows(self, request: Request) -> Response:
        """Send the script the rows that follow its last one."""
        visit = self._visit(request, request.query_params)
        try:
            inventory = await self._inventory(visit)
        except latchkey.LatchkeyError as error:
            return self._renderer.message(_unchanged(error), visit.viewer, part=is_part(request))
        matching = inventory.matching(visit.filter)
        after = request.query_params.get("after", "")
        rows = listing.rows_after(matching, after, listing.ROWS_STEP)
        context = {**_rows_context(inventory, visit.filter), "rows": rows}
        return self._renderer.fragment("rows.html", context)

    async def new(self, request: Request) -> Response:
        """Show the form for a new token."""
        visit = self._visit(request, request.query_params)
        draft = self._drafts.pop(str(request.session.pop("draft", "")))
        return await self._form(request, visit, draft or TokenForm())

    async def create(self, request: Request) -> Response:
        """Create the form's token once, or show the form again with its errors."""
        fields = await _fields(request)
        form = TokenForm.read(fields)
        try:
            visit = self._visit(request, fields)
        except NotSignedIn:
            self._keep_draft(request, form)
            raise
        mark = self._seals.form(fields.get("form", ""), visit.session, visit.account_id)
        if mark is None or not self._is_ours(fields, visit):
            return await self._form(request, visit, form.with_errors({"": _STALE}), status=403)
        new = form.checked(self._now())
        if isinstance(new, TokenForm):
            return await self._form(request, visit, new, status=422)
        outcome = await self._creations.create(
            mark, visit.owner, visit.account_id, new, replace="replace" in fields
        )
        match outcome:
            case Made():
                return RedirectResponse(f"/created/{outcome.place}{visit.filter.query}", 303)
            case Different():
                text = (
                    f"This form has already created the token “{outcome.name}”. To create another "
                    "token, check the form and submit it again."
                )
                return await self._form(request, visit, form.with_errors({"": text}), status=409)
            case NotMade():
                return await self._not_made(request, visit, form, outcome.error)
            case Lost():
                return await self._lost(request, visit, form, fields["form"], new, outcome)

    async def created(self, request: Request) -> Response:
        """Show a new token with its secret, once and only to the session that created it."""
        visit = self._visit(request, request.query_params)
        if request.method == "HEAD" or "prefetch" in request.headers.get("sec-purpose", ""):
            # No person is looking, so keep the single display of the secret.
            return Response(status_code=204)
        # Fetch the list first: once the secret is taken, nothing may prevent its display.
        context = await self._behind(request, visit)
        shown = self._creations.show(request.path_params["place"], visit.owner)
        if shown is None:
            message = Trouble(
                404,
                "Nothing to show here",
                "A token's secret is shown once, right after creation, to whoever created it.",
            )
            return self._renderer.message(message, visit.viewer, part=is_part(request))
        secret = None if shown.secret is None else shown.secret.reveal()
        values = {"token": shown.token, "secret": secret, "dialog": "created.html"}
        return self._renderer.page(request, {**context, **values})

    async def confirm_delete(self, request: Request) -> Response:
        """Ask for confirmation before a deletion."""
        visit = self._visit(request, request.query_params)
        token_id = request.query_params.get("id", "")
        try:
            token = await self._client.get(visit.account_id, token_id)
        except (latchkey.NotFound, latchkey.InvalidArgument):
            # Deleted elsewhere in the meantime, so there is nothing to confirm.
            return await self._list(request, visit, Notice("gone", token_id, ""))
        except latchkey.LatchkeyError as error:
            return self._renderer.message(_unchanged(error), visit.viewer, part=is_part(request))
        return await self._dialog(request, visit, "delete.html", {"token": token})

    async def delete(self, request: Request) -> Response:
        """Delete a token and show the receipt on the list."""
        began = self._monotonic()
        fields = await _fields(request)
        visit = self._visit(request, fields)
        if not self._is_ours(fields, visit):
            message = Trouble(
                403, "This page has expired", "Nothing was deleted. Reload the page and try again."
            )
            return self._renderer.message(message, visit.viewer, part=is_part(request))
        token_id = fields.get("id", "")
        token = None
        try:
            # The receipt shows the name and scope of the real token, not a form's claims.
            token = await self._client.get(visit.account_id, token_id)
        except (latchkey.NotFound, latchkey.InvalidArgument):
            pass
        except latchkey.LatchkeyError as error:
            return self._renderer.message(_unchanged(error), visit.viewer, part=is_part(request))
        receipt = None
        try:
            receipt = await self._client.delete(visit.account_id, token_id)
        except (latchkey.NotFound, latchkey.InvalidArgument):
            pass
        except latchkey.LatchkeyError as error:
            return await self._not_deleted(request, visit, token, token_id, error)
        notice = _notice(token_id, token, receipt, self._monotonic() - began)
        if receipt is not None:  # without a receipt, the id is arbitrary user input
            _log.info("%s: account %s, token %s", notice.kind, visit.account_id, token_id)
        self._notices.put(visit.owner, notice)
        return RedirectResponse(f"/{visit.filter.query}", 303)

    def _visit(self, request: Request, query: Mapping[str, str]) -> Visit:
        viewer = self._identity.viewer(request)
        return Visit(viewer, session_id(request), Filter.read(query))

    def _keep_draft(self, request: Request, form: TokenForm) -> None:
        """Keep the form's input until after the sign-in; names do not belong in cookies."""
        request.session["draft"] = draft = secrets.token_urlsafe(12)
        request.session["return"] = "/new"
        self._drafts.put(draft, form)

    def _is_ours(self, fields: Mapping[str, str], visit: Visit) -> bool:
        return self._seals.is_csrf(fields.get("csrf", ""), visit.session, visit.account_id)

    async def _inventory(self, visit: Visit) -> Inventory:
        return await listing.fetch(self._client, visit.account_id, self._now())

    async def _list(self, request: Request, visit: Visit, notice: Notice | None = None) -> Response:
        context = await self._context(visit)
        context["notice"] = notice or self._notices.pop(visit.owner)
        message: Trouble | None = context["trouble"]
        return self._renderer.page(request, context, message.status if message else 200)

    async def _dialog(
        self,
        request: Request,
        visit: Visit,
        dialog: str,
        values: Mapping[str, Any],
        status: int = 200,
    ) -> Response:
        """Return a dialog: alone for the script, otherwise over the list."""
        context = await self._behind(request, visit)
        return self._renderer.page(request, {**context, **values, "dialog": dialog}, status)

    async def _behind(self, request: Request, visit: Visit) -> dict[str, Any]:
        """Return the context behind a dialog. The script already has the list."""
        return self._frame(visit) if is_part(request) else await self._context(visit)

    async def _form(
        self, request: Request, visit: Visit, form: TokenForm, status: int = 200
    ) -> Response:
        mark = self._seals.new_form(visit.session, visit.account_id)
        return await self._dialog(request, visit, "new.html", {"form": form, "mark": mark}, status)

    async def _not_made(
        self, request: Request, visit: Visit, form: TokenForm, error: latchkey.LatchkeyError
    ) -> Response:
        match error:
            case latchkey.AlreadyExists():
                text = (
                    "You already have a token with this name (names are not case-sensitive). "
                    "Choose another name, or delete that token first."
                )
                return await self._form(request, visit, form.with_errors({"name": text}), 409)
            case latchkey.InvalidArgument():
                return await self._form(request, visit, form.refused(error.field_violations), 422)
            case _:
                message = trouble(error)
                text = f"{message.title}, so nothing was created. {message.text}"
                form = form.with_errors({"": text})
                return await self._form(request, visit, form, message.status)

    async def _lost(
        self,
        request: Request,
        visit: Visit,
        form: TokenForm,
        mark: str,
        new: NewToken,
        outcome: Lost,
    ) -> Response:
        message = None if outcome.error is None else trouble(outcome.error)
        # The same mark, so that submitting the form again continues this attempt.
        values = {
            "form": form,
            "mark": mark,
            "name": new.name,
            "found": outcome.found,
            "message": message,
        }
        return await self._dialog(request, visit, "lost.html", values, 503)

    async def _not_deleted(
        self,
        request: Request,
        visit: Visit,
        token: latchkey.Token | None,
        token_id: str,
        error: latchkey.LatchkeyError,
    ) -> Response:
        message = trouble(error)
        if is_refusal(error):
            return self._renderer.message(_unchanged(error), visit.viewer, part=is_part(request))
        values = {"token": token, "token_id": token_id, "message": message}
        return await self._dialog(request, visit, "unconfirmed.html", values, message.status)

    def _frame(self, visit: Visit) -> dict[str, Any]:
        """Return the context that every page needs."""
        return {
            "viewer": visit.viewer,
            "csrf": self._seals.csrf(visit.session, visit.account_id),
            "filter": visit.filter,
            "dialog": None,
            "notice": None,
        }

    async def _context(self, visit: Visit) -> dict[str, Any]:
        """Return the context of the list, or of the error if Latchkey does not provide one."""
        frame = self._frame(visit)
        try:
            inventory = await self._inventory(visit)
        except latchkey.LatchkeyError as error:
            _log.warning("list failed: %s", error.code.name)
            return {**frame, "trouble": trouble(error)}
        matching = inventory.matching(visit.filter)
        return {
            **frame,
            **_rows_context(inventory, visit.filter),
            "trouble": None,
            "findings": inventory.findings(),
            "total": len(inventory.tokens),
            "complete": inventory.complete,
            "matching": len(matching),
            "rows": matching[: visit.filter.rows],
        }


def _rows_context(inventory: Inventory, wanted: Filter) -> dict[str, Any]:
    return {
        "filter": wanted,
        "now": inventory.now,
        "kinds": inventory.kinds,
        "use_recorded": inventory.use_recorded,
    }


async def _fields(request: Request) -> dict[str, str]:
    try:
        return await read_form(request)
    except BadForm:
        raise Refused(400, "Invalid form", "Nothing was changed. Go back and try again.") from None


def _unchanged(error: latchkey.LatchkeyError) -> Trouble:
    message = trouble(error)
    return Trouble(
        message.status,
        message.title,
        f"Nothing was changed. {message.text}",
        message.request_id,
        message.retry_seconds,
    )


def _notice(
    token_id: str, token: latchkey.Token | None, receipt: latchkey.Receipt | None, seconds: float
) -> Notice:
    # None means that the deletion is committed but some verifier may not know of it yet.
    effective_time: datetime | None = receipt.effective_time if receipt else None
    unconfirmed = receipt is not None and effective_time is None
    if token is None:
        return Notice("unconfirmed" if unconfirmed else "gone", token_id, "", receipt=receipt)
    return Notice(
        "unconfirmed" if unconfirmed else "deleted",
        token_id,
        token.name,
        token.scope.value,
        # Measured on one clock from the request's arrival to Latchkey's answer. By then the token
        # was dead everywhere.
        max(1, round(seconds * 1_000)),
        receipt,
    )
