"""Checks the types of the Python in documents, as a reader's own strict mypy does."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.checks.steps import ROOT, Outcome, command

__all__ = ["blocks", "check"]

DOCUMENTS = ("README.md", "clients/python/README.md", "docs/**/*.md")
BLOCK = re.compile(
    r"^(?:<!-- test: (?P<mark>[^\n]+) -->\n)?```python\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# A collector without annotations, because prometheus-client calls it.
UNTYPED = {"python metrics"}


def blocks(root: Path) -> Iterator[tuple[str, str]]:
    """Return the name of each file and its code: that of the page, or a number."""
    for pattern in DOCUMENTS:
        for path in sorted(root.glob(pattern)):
            page = path.relative_to(root).with_suffix("").as_posix().replace("/", "_")
            for number, found in enumerate(BLOCK.finditer(path.read_text("utf-8"))):
                mark = found["mark"] or ""
                # Without an import, it is a line that belongs into a reader's own program.
                if mark not in UNTYPED and "import " in found["code"]:
                    name = mark.removeprefix("file ") if mark.startswith("file ") else ""
                    yield f"{page.lower()}/{name or f'{page.lower()}_{number}.py'}", found["code"]


def check(root: Path) -> Outcome:
    """Write each block to a file below build/blocks and check all of them."""
    folder = root / "build/blocks"
    shutil.rmtree(folder, ignore_errors=True)
    pages = set()
    for name, code in blocks(root):
        path = folder / name
        pages.add(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code, "utf-8")
    # Files of one page may import each other.
    paths = [f"{path}" for page in sorted(pages) for path in sorted(page.glob("*.py"))]
    return command(
        *("env", f"MYPYPATH={':'.join(map(str, sorted(pages)))}"),
        *("mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml"), *paths),
    )
