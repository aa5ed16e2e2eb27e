"""The pages that list, create and delete tokens: one method per route.

Every page works with plain links, forms and redirects. The page's own script sends a header and
receives only the part that it inserts: the list without the frame, or a dialog without the list.
Nothing else differs.
"""

import json
import logging
from dataclasses import replace
from datetime import datetime
from typing import Any, Final
from urllib.parse import urlencode

import latchkey
from starlette.requests import Request
from starlette.responses import Response

from latchkey_console import listing
from latchkey_console.creation import Creations, Different, Lost, NotMade
from latchkey_console.failures import Trouble, is_refusal, trouble
from latchkey_console.forms import TOKEN_BYTES_MAX, NewToken, TokenForm, expiries, last_day
from latchkey_console.frame import Frame, Notice, Visit, read_fields, rows_context, unchanged
from latchkey_console.identity import NotSignedIn
from latchkey_console.settings import is_account_id
from latchkey_console.showing import Displays, NewSecret, Used, place_of
from latchkey_console.text import visible

__all__ = ["Pages"]

_log = logging.getLogger("latchkey.console")

# Signing in takes a while if the visitor must reset a password.
DRAFT_SECONDS: Final = 900
# The input waits in the session, which has to fit into a cookie of 4 kB, with what the provider
# needs for the sign-in.
DRAFT_BYTES_MAX: Final = 1_400
# The header with the address of the next rows, for the script that loads them.
NEXT_HEADER: Final = "x-latchkey-next"

_NOT_KEPT: Final = "The form was too long to be kept, so you have to fill it in again."
_STALE: Final = (
    "This form has expired or belongs to another session. Nothing was created. "
    "Check the form and submit it again."
)


class Pages:
    """Handles the requests. Raises NotSignedIn and Refused, which the application handles."""

    def __init__(self, frame: Frame, displays: Displays) -> None:
        self._frame = frame
        self._client = frame.client
        self._renderer = frame.renderer
        self._displays = displays
        self._creations = Creations(frame.client, frame.now)

    async def index(self, request: Request) -> Response:
        """Show the list and the notice that the previous request left."""
        return await self._frame.list(request, self._frame.visit(request, request.query_params))

    async def rows(self, request: Request) -> Response:
        """Send the script the rows that follow its last one."""
        visit = self._frame.visit(request, request.query_params)
        wanted = replace(visit.filter, rows=listing.ROWS_STEP)
        try:
            listed = await listing.more_rows(
                self._client, visit.account_id, wanted, self._frame.now()
            )
        except latchkey.LatchkeyError as error:
            return self._frame.message(request, visit, unchanged(error))
        # The links of these rows lead back to the whole list.
        context = rows_context(listed, visit.filter.first_rows())
        response = self._renderer.fragment("rows.html", context)
        if listed.following:
            following = wanted.after(listed.following, wanted.at or listed.now)
            address = self._renderer.address(f"/rows{following.query}")
            response.headers[NEXT_HEADER] = address
        return response

    async def new(self, request: Request) -> Response:
        """Show the form for a new token."""
        visit = self._frame.visit(request, request.query_params)
        return await self._form(request, visit, self._draft(request))

    async def create(self, request: Request) -> Response:
        """Create the form's token once, or show the form again with its errors."""
        fields = await read_fields(request, bytes_max=TOKEN_BYTES_MAX)
        form = TokenForm.read(fields)
        try:
            visit = self._frame.visit(request, fields)
        except NotSignedIn:
            if not self._keep_draft(request, form, fields.get("account", "")):
                raise NotSignedIn(_NOT_KEPT) from None
            raise
        mark = self._frame.mark(fields, visit)
        if mark is None:
            return await self._form(request, visit, form.with_errors({"": _STALE}), status=403)
        new = form.checked(self._frame.now())
        if isinstance(new, TokenForm):
            return await self._form(request, visit, new, status=422)
        used = self._displays.used(request, visit.owner, mark, new)
        if used is not None:
            return await self._used(request, visit, form, used)
        again = "again" in fields
        outcome = await self._creations.create(mark, visit.account_id, new, again=again)
        match outcome:
            case NewSecret():
                place = place_of(mark)
                response = self._frame.redirect(f"/created/{place}{visit.filter.query}")
                self._displays.leave(request, response, visit.owner, mark, new, outcome)
                return response
            case Different():
                return await self._used(request, visit, form, None)
            case NotMade():
                return await self._not_made(request, visit, form, outcome.error)
            case Lost():
                return await self._lost(request, visit, form, fields["form"], new, outcome)

    async def created(self, request: Request) -> Response:
        """Show a new token with its secret, once and only to the session that created it."""
        visit = self._frame.visit(request, request.query_params)
        if request.method == "HEAD" or "prefetch" in request.headers.get("sec-purpose", ""):
            # No person is looking, so keep the single display of the secret.
            return Response(status_code=204)
        # Fetch the list first: once the secret is taken, nothing may prevent its display.
        context = await self._frame.behind(request, visit)
        place = request.path_params["place"]
        shown = await self._displays.show(request, place, visit.owner)
        if shown is None:
            message = Trouble(
                404,
                "Nothing to show here",
                "A token's secret is shown once, right after creation, to whoever created it.",
            )
            return self._frame.message(request, visit, message)
        secret = None if shown.secret is None else shown.secret.reveal()
        values = {"token": shown.token, "shown": shown, "secret": secret, "dialog": "created.html"}
        response = self._renderer.page(request, {**context, **values})
        self._displays.end(request, response, place)
        return response

    async def confirm_delete(self, request: Request) -> Response:
        """Ask for confirmation before a deletion."""
        visit = self._frame.visit(request, request.query_params)
        token_id = request.query_params.get("id", "")
        token = await self._frame.token(request, visit, token_id)
        if isinstance(token, Response):
            return token
        return await self._frame.dialog(request, visit, "delete.html", {"token": token})

    async def delete(self, request: Request) -> Response:
        """Delete a token and show the receipt on the list."""
        began = self._frame.monotonic()
        fields = await read_fields(request)
        visit = self._frame.visit(request, fields)
        if not self._frame.is_ours(fields, visit):
            return self._frame.expired(request, visit)
        token_id = fields.get("id", "")
        token = None
        try:
            # The receipt shows the name and scope of the real token, not a form's claims.
            token = await self._client.get(visit.account_id, token_id)
        except (latchkey.NotFound, latchkey.InvalidArgument):
            pass
        except latchkey.LatchkeyError as error:
            return self._frame.message(request, visit, unchanged(error))
        receipt = None
        try:
            receipt = await self._client.delete(visit.account_id, token_id)
        except (latchkey.NotFound, latchkey.InvalidArgument):
            pass
        except latchkey.LatchkeyError as error:
            return await self._not_deleted(request, visit, token, token_id, error)
        notice = _notice(token_id, token, receipt, self._frame.milliseconds_since(began))
        if receipt is not None:  # without a receipt, the id is arbitrary user input
            _log.info("%s: account %s, token %s", notice.kind, visit.account_id, token_id)
        return self._frame.done(visit, notice)

    def _keep_draft(self, request: Request, form: TokenForm, account: str) -> bool:
        """Keep the form's input until after the sign-in, in the sealed session. Return False if it
        is too long.
        """
        draft = form.typed
        fits = len(json.dumps(draft)) <= DRAFT_BYTES_MAX
        if fits:
            until = int(self._frame.now().timestamp()) + DRAFT_SECONDS
            request.session["draft"] = {"form": draft, "until": until}
        # The sign-in checks the account again.
        named = f"?{urlencode({'account': account})}" if is_account_id(account) else ""
        request.session["return"] = f"/new{named}"
        return fits

    def _draft(self, request: Request) -> TokenForm | None:
        """Return the input that was kept, once."""
        kept: dict[str, Any] = request.session.pop("draft", None) or {"until": 0}
        late = self._frame.now().timestamp() > kept["until"]
        return None if late else TokenForm(**kept["form"])

    async def _used(
        self, request: Request, visit: Visit, form: TokenForm, used: Used | None
    ) -> Response:
        """Answer a form that has created a token before."""
        if used is not None and used.same:
            return self._frame.redirect(f"/created/{used.place}{visit.filter.query}")
        what = "a token"
        if used is not None:
            try:
                token = await self._client.get(visit.account_id, used.token_id)
            except latchkey.LatchkeyError as error:
                _log.info("token name unavailable: %s", error.code.name)
            else:
                what = f"the token “{visible(token.name)}”"
        text = (
            f"This form has already created {what}. To create another token, check the form and "
            "submit it again."
        )
        return await self._form(request, visit, form.with_errors({"": text}), status=409)

    async def _form(
        self, request: Request, visit: Visit, form: TokenForm | None, status: int = 200
    ) -> Response:
        limits = await self._frame.limits(visit)
        values = {
            "form": form or TokenForm.within(limits),
            "mark": self._frame.new_mark(visit),
            "limits": limits,
            "expiries": expiries(limits),
            "last_day": last_day(limits, self._frame.now()),
        }
        return await self._frame.dialog(request, visit, "new.html", values, status)

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
            case latchkey.NotFound():
                text = (
                    "The token that this form created has been deleted. To create another token, "
                    "submit the form again."
                )
                return await self._form(request, visit, form.with_errors({"": text}), 409)
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
        return await self._frame.dialog(request, visit, "lost.html", values, 503)

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
            return self._frame.message(request, visit, unchanged(error))
        values = {"token": token, "token_id": token_id, "message": message}
        return await self._frame.dialog(request, visit, "unconfirmed.html", values, message.status)


def _notice(
    token_id: str,
    token: latchkey.Token | None,
    receipt: latchkey.Receipt | None,
    milliseconds: int,
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
        milliseconds,
        receipt,
    )
