"""The pages that act on several tokens or findings at once, as in `pages`."""

import logging

import latchkey
from latchkey import TokenFilter
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from latchkey_console.failures import Trouble, is_refusal, trouble
from latchkey_console.forms import SELECTED_MAX
from latchkey_console.frame import Frame, Notice, Visit, read_fields, unchanged

__all__ = ["Selection"]

_log = logging.getLogger("latchkey.console")

_NONE = Trouble(
    422, "No token is selected", "Nothing was changed. Go back and select the tokens to delete."
)
_TOO_MANY = Trouble(
    422,
    "Too many tokens are selected",
    f"Nothing was changed. Select at most {SELECTED_MAX} tokens at a time.",
)


class Selection:
    """Handles the requests. Raises NotSignedIn and Refused, which the application handles."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._client = frame.client

    def routes(self) -> list[Route]:
        """Return the routes of these pages."""
        return [
            Route("/selected", self.confirm, methods=["POST"]),
            Route("/delete-selected", self.delete, methods=["POST"]),
            Route("/reviewed", self.review, methods=["POST"]),
        ]

    async def confirm(self, request: Request) -> Response:
        """Name the selected tokens, and ask for confirmation before their deletion."""
        selected = await self._selected(request)
        if isinstance(selected, Response):
            return selected
        visit, ids = selected
        try:
            page = await self._client.list_page(
                visit.account_id, TokenFilter(ids=ids), page_size=SELECTED_MAX
            )
        except latchkey.LatchkeyError as error:
            return self._frame.message(request, visit, unchanged(error))
        if not page.tokens:
            return await self._frame.list(request, visit, Notice("gone", "", ""))
        values = {"tokens": page.tokens}
        return await self._frame.dialog(request, visit, "selected.html", values)

    async def delete(self, request: Request) -> Response:
        """Delete the tokens under one revision, and show their receipt on the list."""
        began = self._frame.monotonic()
        selected = await self._selected(request)
        if isinstance(selected, Response):
            return selected
        visit, ids = selected
        try:
            done = await self._client.delete_all(visit.account_id, TokenFilter(ids=ids))
        except latchkey.LatchkeyError as error:
            if is_refusal(error):
                return self._frame.message(request, visit, unchanged(error))
            message = trouble(error)
            values = {
                "act": "delete-selected",
                "token_id": "",
                "ids": " ".join(ids),
                "message": message,
            }
            return await self._frame.dialog(request, visit, "unsure.html", values, message.status)
        _log.info("deleted: account %s, %d tokens", visit.account_id, done.count)
        notice = Notice(
            "several-deleted",
            "",
            "",
            milliseconds=self._frame.milliseconds_since(began),
            receipt=done.receipt,
            count=done.count,
            asked=len(ids),
        )
        return self._frame.done(visit, notice)

    async def review(self, request: Request) -> Response:
        """Remember that the visitor is done with a kind of finding, or forget all of these."""
        fields = await read_fields(request)
        visit = self._frame.visit(request, fields)
        if not self._frame.is_ours(fields, visit):
            return self._frame.expired(request, visit)
        response = self._frame.redirect(f"/{visit.filter.query}")
        reviewed, kind = self._frame.reviewed, fields.get("kind", "")
        if kind:
            count = fields.get("count", "")
            reviewed.add(request, response, visit.account_id, self._frame.now(), kind, count)
        else:
            reviewed.clear(response)
        return response

    async def _selected(self, request: Request) -> tuple[Visit, tuple[str, ...]] | Response:
        """Return the visit and the ids that our form selects, or the response instead."""
        fields = await read_fields(request, "ids")
        visit = self._frame.visit(request, fields)
        if not self._frame.is_ours(fields, visit):
            return self._frame.expired(request, visit)
        ids = tuple(dict.fromkeys(fields["ids"].split()))
        if not ids or len(ids) > SELECTED_MAX:
            return self._frame.message(request, visit, _TOO_MANY if ids else _NONE)
        return visit, ids
