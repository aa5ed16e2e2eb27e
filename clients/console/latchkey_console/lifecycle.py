"""The pages that show and change one token: one method per route, as in `pages`."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

import latchkey
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from latchkey_console.creation import Different
from latchkey_console.editing import EditForm, ReplaceForm, ends_within
from latchkey_console.failures import is_refusal, trouble
from latchkey_console.forms import TOKEN_BYTES_MAX, durations, expiries, last_day
from latchkey_console.frame import Frame, Notice, Visit, read_fields, unchanged
from latchkey_console.replacing import NotReplaced, Replacements
from latchkey_console.reporters import Reporters
from latchkey_console.showing import Displays, NewSecret, place_of

__all__ = ["Lifecycle"]

_log = logging.getLogger("latchkey.console")

_STALE: Final = (
    "This form has expired or belongs to another session. Nothing was changed. "
    "Check the form and submit it again."
)
_AGAIN: Final = (
    "This form has already replaced the secret. To replace it once more, check the choices and "
    "submit the form again."
)


class Lifecycle:
    """Handles the requests. Raises NotSignedIn and Refused, which the application handles."""

    def __init__(self, frame: Frame, displays: Displays) -> None:
        self._frame = frame
        self._client = frame.client
        self._reporters = Reporters(frame.client, frame.monotonic)
        self._displays = displays
        self._replacements = Replacements(frame.client, frame.now)

    def routes(self) -> list[Route]:
        """Return the routes of these pages."""
        return [
            Route("/token", self.token),
            Route("/replace", self.replace_form),
            Route("/replace", self.replace, methods=["POST"]),
            Route("/edit", self.edit_form),
            Route("/edit", self.edit, methods=["POST"]),
            Route("/disable", self.confirm_disable),
            Route("/disable", self.disable, methods=["POST"]),
            Route("/enable", self.enable, methods=["POST"]),
            Route("/retire", self.confirm_retire),
            Route("/retire", self.retire, methods=["POST"]),
        ]

    async def token(self, request: Request) -> Response:
        """Show a token's details and who uses it."""
        visit, token = await self._asked(request)
        if isinstance(token, Response):
            return token
        usage: tuple[latchkey.CallerUsage, ...] | None = None
        try:
            usage = await self._client.get_usage(visit.account_id, token.id)
        except latchkey.LatchkeyError as error:
            # The rest is worth showing. A policy, or an older server, may refuse this.
            _log.info("usage is not shown: %s", error.code.name)
        reporters = await self._reporters.of(visit.account_id, token)
        values = {"token": token, "usage": usage, "reporters": reporters}
        return await self._frame.dialog(request, visit, "token.html", values)

    async def replace_form(self, request: Request) -> Response:
        """Ask how long the old secret should still work."""
        visit, token = await self._asked(request)
        if isinstance(token, Response):
            return token
        return await self._replace_form(request, visit, token, None)

    async def replace(self, request: Request) -> Response:
        """Replace a secret once, or show the form again with its error."""
        fields = await read_fields(request)
        visit = self._frame.visit(request, fields)
        form, token_id = ReplaceForm.read(fields), fields.get("id", "")
        mark = self._frame.mark(fields, visit)
        wanted = form.checked(token_id)
        if mark is None or wanted is None:
            status = 403 if mark is None else 422
            error = _STALE if mark is None else "Choose when the old secret stops working."
            return await self._replace_again(request, visit, token_id, form, error, status)
        used = self._displays.used(request, visit.owner, mark, wanted)
        if used is not None:
            if used.same:
                return self._frame.redirect(f"/created/{used.place}{visit.filter.query}")
            return await self._replace_again(request, visit, token_id, form, _AGAIN, 409)
        outcome = await self._replacements.replace(mark, visit.account_id, wanted)
        match outcome:
            case NewSecret():
                place = place_of(mark)
                response = self._frame.redirect(f"/created/{place}{visit.filter.query}")
                self._displays.leave(request, response, visit.owner, mark, wanted, outcome)
                return response
            case Different():
                return await self._replace_again(request, visit, token_id, form, _AGAIN, 409)
            case NotReplaced():
                return await self._not_replaced(request, visit, token_id, form, outcome, fields)

    async def edit_form(self, request: Request) -> Response:
        """Show the form with a token's settings."""
        visit, token = await self._asked(request)
        if isinstance(token, Response):
            return token
        return await self._edit_form(request, visit, token, EditForm.of(token))

    async def edit(self, request: Request) -> Response:
        """Save what the visitor changed, or show the form again with its errors."""
        began = self._frame.monotonic()
        fields = await read_fields(request, bytes_max=TOKEN_BYTES_MAX)
        visit = self._frame.visit(request, fields)
        form, token_id = EditForm.read(fields), fields.get("id", "")
        if not self._frame.is_ours(fields, visit):
            return await self._edit_again(
                request, visit, token_id, form.with_errors({"": _STALE}), 403
            )
        changes = form.checked(self._frame.now())
        if isinstance(changes, EditForm):
            return await self._edit_again(request, visit, token_id, changes, 422)
        if not changes:
            return self._frame.redirect(f"/{visit.filter.query}")
        try:
            change = await self._client.update(visit.account_id, token_id, **changes)
        except latchkey.NotFound:
            return await self._frame.list(request, visit, Notice("gone", token_id, ""))
        except latchkey.AlreadyExists:
            text = (
                "You already have a token with this name (names are not case-sensitive). "
                "Choose another name."
            )
            form = form.with_errors({"name": text})
            return await self._edit_again(request, visit, token_id, form, 409)
        except latchkey.InvalidArgument as error:
            form = form.refused(error.field_violations)
            return await self._edit_again(request, visit, token_id, form, 422)
        except latchkey.LatchkeyError as error:
            form = form.with_errors({"": _why_not(error, "saved", "save")})
            status = trouble(error).status
            return await self._edit_again(request, visit, token_id, form, status)
        return self._done(visit, "updated", change, began)

    async def confirm_disable(self, request: Request) -> Response:
        """Ask for confirmation before a token is disabled."""
        return await self._confirm(request, "disable")

    async def disable(self, request: Request) -> Response:
        """Disable a token and show the receipt on the list."""
        return await self._act(request, "disable", "disabled", self._client.disable)

    async def enable(self, request: Request) -> Response:
        """Enable a token."""
        return await self._act(request, "enable", "enabled", self._client.enable)

    async def confirm_retire(self, request: Request) -> Response:
        """Ask for confirmation before the old secrets end."""
        return await self._confirm(request, "retire")

    async def retire(self, request: Request) -> Response:
        """End all secrets but the newest and show the receipt on the list."""
        return await self._act(request, "retire", "retired", self._client.retire_secrets)

    async def _asked(self, request: Request) -> tuple[Visit, latchkey.Token | Response]:
        visit = self._frame.visit(request, request.query_params)
        token_id = request.query_params.get("id", "")
        return visit, await self._frame.token(request, visit, token_id)

    async def _confirm(self, request: Request, act: str) -> Response:
        visit, token = await self._asked(request)
        if isinstance(token, Response):
            return token
        values = {"token": token, "act": act}
        return await self._frame.dialog(request, visit, "confirm.html", values)

    async def _act(
        self,
        request: Request,
        act: str,
        kind: str,
        change_token: Callable[[str, str], Awaitable[latchkey.Change]],
    ) -> Response:
        began = self._frame.monotonic()
        fields = await read_fields(request)
        visit = self._frame.visit(request, fields)
        if not self._frame.is_ours(fields, visit):
            return self._frame.expired(request, visit)
        token_id = fields.get("id", "")
        try:
            change = await change_token(visit.account_id, token_id)
        except (latchkey.NotFound, latchkey.InvalidArgument):
            return await self._frame.list(request, visit, Notice("gone", token_id, ""))
        except latchkey.LatchkeyError as error:
            if is_refusal(error):
                return self._frame.message(request, visit, unchanged(error))
            message = trouble(error)
            values = {"act": act, "token_id": token_id, "message": message}
            return await self._frame.dialog(request, visit, "unsure.html", values, message.status)
        return self._done(visit, kind, change, began)

    def _done(self, visit: Visit, kind: str, change: latchkey.Change, began: float) -> Response:
        token = change.token
        _log.info("%s: account %s, token %s", kind, visit.account_id, token.id)
        notice = Notice(
            kind,
            token.id,
            token.name,
            token.scope.value,
            self._frame.milliseconds_since(began),
            change.receipt,
        )
        return self._frame.done(visit, notice)

    async def _not_replaced(
        self,
        request: Request,
        visit: Visit,
        token_id: str,
        form: ReplaceForm,
        outcome: NotReplaced,
        fields: dict[str, str],
    ) -> Response:
        error = outcome.error
        if isinstance(error, latchkey.NotFound):
            return await self._frame.list(request, visit, Notice("gone", token_id, ""))
        text = _why_not(error, "replaced", "replace")
        if outcome.expiry_moved:
            text = f"{text} The token has its new expiry already."
        # The same mark, so that submitting the form again continues this attempt.
        return await self._replace_again(
            request, visit, token_id, form, text, trouble(error).status, fields["form"]
        )

    async def _replace_again(
        self,
        request: Request,
        visit: Visit,
        token_id: str,
        form: ReplaceForm,
        error: str,
        status: int,
        mark: str | None = None,
    ) -> Response:
        token = await self._frame.token(request, visit, token_id)
        if isinstance(token, Response):
            return token
        return await self._replace_form(request, visit, token, form, error, status, mark)

    async def _replace_form(
        self,
        request: Request,
        visit: Visit,
        token: latchkey.Token,
        form: ReplaceForm | None,
        error: str | None = None,
        status: int = 200,
        mark: str | None = None,
    ) -> Response:
        limits = await self._frame.limits(visit)
        values: dict[str, Any] = {
            "token": token,
            "form": form or ReplaceForm.of(token, self._frame.now(), limits),
            "ends": ends_within(limits),
            "expiries": durations(limits),
            "limits": limits,
            "error": error,
            "mark": mark or self._frame.new_mark(visit),
        }
        return await self._frame.dialog(request, visit, "replace.html", values, status)

    async def _edit_again(
        self, request: Request, visit: Visit, token_id: str, form: EditForm, status: int
    ) -> Response:
        token = await self._frame.token(request, visit, token_id)
        if isinstance(token, Response):
            return token
        return await self._edit_form(request, visit, token, form, status)

    async def _edit_form(
        self,
        request: Request,
        visit: Visit,
        token: latchkey.Token,
        form: EditForm,
        status: int = 200,
    ) -> Response:
        limits = await self._frame.limits(visit)
        values = {
            "token": token,
            "form": form,
            "limits": limits,
            "expiries": expiries(limits),
            "last_day": last_day(limits, self._frame.now()),
        }
        return await self._frame.dialog(request, visit, "edit.html", values, status)


def _why_not(error: latchkey.LatchkeyError, done: str, do: str) -> str:
    """Return the words for a form whose change Latchkey refused or did not confirm."""
    message = trouble(error)
    if is_refusal(error):
        return f"{message.title}, so nothing was {done}. {message.text}"
    return (
        f"{message.title}. The change may have been {done}, but this is not confirmed. "
        f"It is safe to {do} again."
    )
