"""The page on which a visitor with several accounts chooses one."""

from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from latchkey_console.frame import Frame
from latchkey_console.rendering import Renderer

__all__ = ["Choosing"]

# With more accounts, the page has a search field.
SEARCH_FROM: Final = 8
_QUERY_LENGTH_MAX: Final = 128


class Choosing:
    """Handles the requests. Raises NotSignedIn and Refused, which the application handles."""

    def __init__(self, frame: Frame, renderer: Renderer) -> None:
        self._frame = frame
        self._renderer = renderer

    def routes(self) -> list[Route]:
        """Return the routes of this page."""
        return [Route("/accounts", self.accounts)]

    async def accounts(self, request: Request) -> Response:
        """List the visitor's accounts, each with a link to its tokens."""
        visitor, csrf = self._frame.visitor(request)
        accounts = visitor.accounts or ()
        text = request.query_params.get("find", "").strip()[:_QUERY_LENGTH_MAX]
        current = request.query_params.get("account", "")
        context = {
            "viewer": visitor,
            "csrf": csrf,
            "current": current if current in accounts else "",
            "accounts": [one for one in accounts if text.lower() in one.lower()],
            "text": text,
            "searchable": len(accounts) >= SEARCH_FROM,
        }
        return self._renderer.view("accounts.html", context)
