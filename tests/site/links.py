"""Checks the built site: each link leads to a page and a place on it, and nothing is loaded from
another host."""

import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["broken", "foreign"]

# Attributes whose address a browser loads by itself. It opens other links only if a reader asks.
LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("link", "href")}
IN_STYLES = re.compile(r"""(?:url\(|@import\s)["']?((?:https?:)?//[^"')\s]+)""")
# Describes this page for search engines; browsers do not load them.
UNLOADED = {"canonical", "prev", "next"}
# Its links depend on the address at which the site is served.
ERROR_PAGE = "404.html"


class _Page(HTMLParser):
    """Collects the links and the link targets of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.places |= {values[name] for name in ("id", "name") if name in values}
        for name, value in values.items():
            if tag == "a" and name == "href":
                self.links.append(value)
            elif (tag, name) in LOADED and values.get("rel") not in UNLOADED:
                self.loaded.append(value)


def broken(site: Path) -> list[str]:
    """Return the links of the site into the site that lead nowhere."""
    read = {
        path.relative_to(site).as_posix(): _Page(path.read_text("utf-8"))
        for path in site.rglob("*.html")
    }
    found = []
    for name, page in sorted(read.items()):
        if name == ERROR_PAGE:
            continue
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = name
            if parts.path:
                target = posixpath.normpath(
                    posixpath.join(posixpath.dirname(name), unquote(parts.path))
                )
            place = unquote(parts.fragment)
            if not (site / target).exists() or (
                place and target in read and place not in read[target].places
            ):
                found.append(f"{name}: {link}")
    return found


def foreign(site: Path) -> list[str]:
    """Return the addresses on other hosts that a browser loads when it shows the site."""
    found = []
    for path in sorted(site.rglob("*")):
        if path.suffix == ".html":
            addresses = [
                address
                for address in _Page(path.read_text("utf-8")).loaded
                if urlsplit(address).netloc
            ]
        elif path.suffix == ".css":
            addresses = IN_STYLES.findall(path.read_text("utf-8"))
        else:
            continue
        found += [f"{path.relative_to(site)}: {address}" for address in addresses]
    return found
