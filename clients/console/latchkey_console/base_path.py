"""Serves the page below a path, such as /settings/tokens, behind a proxy that keeps the path.

The application does not know the path in its routes. It adds the path to the addresses that it
gives to browsers (`rendering.Renderer`), and this middleware removes it from those that it gets.
"""

from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["BasePath"]


class BasePath:
    """Middleware that removes the base path. Everything outside of it is unknown.

    `open_paths` also work without the base path, because probes and other processes of the console
    do not come through the proxy.
    """

    def __init__(self, app: ASGIApp, base_path: str, open_paths: frozenset[str]) -> None:
        self._app = app
        self._base_path = base_path
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "http" and self._base_path:
            path: str = scope["path"]
            if path == self._base_path:
                # The scripts and the cookies expect the slash.
                query = scope["query_string"].decode("latin-1")
                target = f"{self._base_path}/{f'?{query}' if query else ''}"
                await RedirectResponse(target, 308)(scope, receive, send)
                return
            if path.startswith(f"{self._base_path}/"):
                scope = {**scope, "path": path.removeprefix(self._base_path)}
            elif path not in self._open_paths:
                answer = PlainTextResponse(f"The page is at {self._base_path}/\n", 404)
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)
