"""Copies the repository's documents into one folder, in which each link leads to a page.

A document of the repository links to files anywhere in it, as GitHub shows them. A site contains
pages only. So documents outside docs/ get a page, and each other text file that a document links to
gets one with its content.
"""

import posixpath
import re
import shutil
from pathlib import Path, PurePosixPath

__all__ = ["DOCUMENTS", "BrokenLink", "stage"]

# Documents outside docs/, and the names of their pages.
DOCUMENTS = {
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
    "clients/python/README.md": "client-library.md",
}
# Files whose content another page describes better.
REPLACED = {"proto/latchkey/v1/token_service.proto": "reference/grpc.md"}
IMAGES = {".png", ".svg"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".proto": "proto", ".toml": "toml"}
LINK = re.compile(r"(?<=\]\()([^)#\s]*)(#[^)\s]+)?(?=\))")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


class BrokenLink(Exception):
    """A document links to a file that the repository does not have."""


def stage(root: Path, folder: Path) -> None:
    """Write all pages and pictures below `folder`. Raises BrokenLink."""
    names = {page.relative_to(root).as_posix() for page in root.glob("docs/**/*.md")}
    names |= DOCUMENTS.keys()
    files: set[str] = set()
    for name in sorted(names):
        text = _linked(root, name, files)
        _write(folder / _page(name), text)
    for name in sorted(files):
        path = root / name
        if path.suffix in IMAGES:
            target = folder / _page(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        else:
            content = path.read_text("utf-8")
            language = LANGUAGES.get(path.suffix, "")
            page = f"# {path.name}\n\n`{name}`\n\n````{language}\n{content}\n````\n"
            _write(folder / _page(name), page)


def _page(name: str) -> str:
    """Return the page of a file of the repository."""
    if name in DOCUMENTS or name in REPLACED:
        return DOCUMENTS.get(name) or REPLACED[name]
    path = PurePosixPath(name)
    if path.suffix in {".md", *IMAGES} and path.parts[0] == "docs":
        return str(path.relative_to("docs"))
    return f"files/{name}.md"


def _linked(root: Path, name: str, files: set[str]) -> str:
    """Return a document whose links lead to pages. Add the other files that it links to."""

    def replaced(link: re.Match[str]) -> str:
        target, heading = link[1], link[2] or ""
        if not target or re.match(r"[a-z]+:", target):
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
        if not (root / path).is_file():
            raise BrokenLink(f"{name} links to {target}, which does not exist")
        page = _page(path)
        if path not in DOCUMENTS and path not in REPLACED and not path.endswith(".md"):
            files.add(path)
        return posixpath.relpath(page, posixpath.dirname(_page(name)) or ".") + heading

    parts = FENCE.split((root / name).read_text("utf-8"))
    # Every second part is a block of code, which may contain a text like a link.
    return "".join(part if n % 2 else LINK.sub(replaced, part) for n, part in enumerate(parts))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
