"""Renders templates and serves static files.

This module owns escaping (always on), the format of times and names, and the URLs of static files.
"""

import hashlib
import secrets
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from latchkey import TokenOrder
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from latchkey_console import times
from latchkey_console.cookies import CookieRules
from latchkey_console.failures import Trouble
from latchkey_console.identity import Viewer
from latchkey_console.review import Kind
from latchkey_console.reviewed import REVIEWED_DAYS
from latchkey_console.settings import Brand, Embedding
from latchkey_console.text import visible, visible_lines

__all__ = ["PART_HEADER", "Renderer", "is_part"]

# Sent by the page's own script. Other sites cannot send it: it would need a CORS preflight.
PART_HEADER: Final = "x-latchkey-part"
# The orders of the list, by their names in URLs.
SORTS: Final = {
    "newest": "newest first",
    "-newest": "oldest first",
    "expiry": "earliest expiry first",
    "-expiry": "latest expiry first",
    "last-use": "longest unused first",
    "-last-use": "last used first",
}
_TYPES: Final = {
    "css": "text/css",
    "js": "text/javascript",
    "png": "image/png",
    "svg": "image/svg+xml",
    "webp": "image/webp",
}
SEAL_SECONDS: Final = 60
_THEME: Final = "theme.css"


class Renderer:
    """Renders templates and serves static files. Reads both only once."""

    def __init__(self, brand: Brand, embedding: Embedding, rules: CookieRules) -> None:
        self._rules = rules
        self._base = embedding.base_path
        folder = resources.files("latchkey_console") / "static"
        self._static = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        if brand.theme is not None:
            self._static[_THEME] = brand.theme.encode()
        if brand.logo is not None:
            self._static[brand.logo.name] = brand.logo.data
        digest = hashlib.sha256(b"\0".join(self._static[name] for name in sorted(self._static)))
        # Part of the URL, so that browsers cache a file forever and still fetch a new version.
        self._version = digest.hexdigest()[:12]
        static = f"{self._base}/static/{self._version}"
        # Every template uses these. All apps share the environment, so the context carries them.
        self._common: Final[Mapping[str, Any]] = {
            "base": self._base,
            "brand": brand,
            "has_header": embedding.header,
            "logo": f"{static}/{brand.logo.name if brand.logo else 'icon.svg'}",
            "static": static,
            "theme": None if brand.theme is None else f"{static}/{_THEME}",
        }

    def address(self, path: str) -> str:
        """Return the address, for browsers, of a path of the page."""
        return f"{self._base}{path}"

    def redirect(self, path: str) -> Response:
        """Return a redirect to a path of the page."""
        return RedirectResponse(self.address(path), 303)

    def page(self, request: Request, context: Mapping[str, Any], status: int = 200) -> Response:
        """Return the list with its open dialog, or for the script only the part to insert."""
        layout = "part.html" if is_part(request) else "page.html"
        return self._html("tokens.html", {**context, "layout": layout}, status)

    def message(
        self,
        trouble: Trouble,
        viewer: Viewer | None,
        *,
        part: bool = False,
        action: tuple[str, str] | None = None,
    ) -> Response:
        """Return a page with one message. `action` is a link's text, and its URL or path."""
        if action is not None and action[1].startswith("/"):
            action = (action[0], self.address(action[1]))
        layout = "part.html" if part else "page.html"
        context = {"message": trouble, "viewer": viewer, "action": action, "layout": layout}
        response = self._html(
            "message.html", {**context, "csrf": "", "dialog": None}, trouble.status
        )
        if trouble.retry_seconds is not None:
            response.headers["retry-after"] = str(trouble.retry_seconds)
        return response

    def view(self, name: str, context: Mapping[str, Any], status: int = 200) -> Response:
        """Return a whole page that has no dialog."""
        return self._html(name, {**context, "dialog": None}, status)

    def fragment(self, name: str, context: Mapping[str, Any]) -> Response:
        """Return a template without the frame."""
        return self._html(name, context, 200)

    def static(self, request: Request) -> Response:
        """Return a static file that browsers may cache forever, or 404.

        During an upgrade, a page may come from a process of the other release. Then the file is
        ours, and browsers do not keep it.
        """
        name = request.path_params["name"]
        if name not in self._static:
            return Response(status_code=404)
        same = request.path_params["version"] == self._version
        kept = {"cache-control": "public, max-age=31536000, immutable"}
        return Response(
            self._static[name],
            media_type=_TYPES[name.rpartition(".")[2]],
            headers=kept if same else {},
        )

    def seal(self, _: Request) -> Response:
        """Return the picture on the page with a secret, and set a cookie that nobody reads.

        Chromium keeps pages in its back/forward cache despite no-store, until one of their cookies
        changes while they are shown. This cookie is that change, for browsers without JavaScript.
        With JavaScript, the script erases the secret.
        """
        response = Response(
            self._static["icon.svg"],
            media_type=_TYPES["svg"],
            headers={"cache-control": "no-store"},
        )
        self._rules.set(response, "-seal", secrets.token_hex(8), SEAL_SECONDS)
        return response

    def _html(self, name: str, context: Mapping[str, Any], status: int) -> Response:
        template = _environment().get_template(name)
        return HTMLResponse(template.render({**self._common, **context}), status)


@cache
def _environment() -> Environment:
    """Return the environment of all pages in this process, which compiles each template once."""
    environment = Environment(
        loader=PackageLoader("latchkey_console"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters |= {
        "ago": times.ago,
        "exact": times.exact,
        "iso": times.iso,
        "minute": times.minute,
        "sort_words": SORTS.__getitem__,
        "span": times.span,
        "visible": visible,
        "visible_lines": visible_lines,
    }
    environment.globals |= {
        "Kind": Kind,
        "Order": TokenOrder,
        "reviewed_days": REVIEWED_DAYS,
        "sorts": SORTS.items(),
    }
    return environment


def is_part(request: Request) -> bool:
    """Return whether the page's script sent the request."""
    return PART_HEADER in request.headers
