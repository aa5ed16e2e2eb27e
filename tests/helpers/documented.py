"""Finds the blocks of code in documents, and runs commands as a reader would paste them."""

import asyncio
import os
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.helpers.repository import ROOT

__all__ = ["DOCUMENTS", "Block", "blocks", "marked", "paste", "paste_both"]

# What readers get, by its path in the repository.
DOCUMENTS: Final = tuple(
    sorted(
        path.relative_to(ROOT).as_posix()
        for pattern in (
            *("*.md", "docs/**/*.md", "clients/**/README.md", "deploy/**/*.md"),
            *("examples/**/*.md", "proto/**/*.md"),
        )
        for path in ROOT.glob(pattern)
    )
)
# Some commands of half a second each, on a busy machine.
SECONDS: Final = 90.0
_BLOCK: Final = re.compile(
    r"^(?:(?P<before> *)<!-- test: (?P<mark>[^\n]+) -->\n)?"
    r"(?P<margin> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=margin)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of code in a document. `mark` is empty without a comment that names a test."""

    page: str
    mark: str
    language: str
    text: str


def blocks(page: str, text: str | None = None) -> list[Block]:
    """Return the blocks of a document, in order, without their margins."""
    if text is None:
        text = (ROOT / page).read_text("utf-8")
    return [
        Block(page, found["mark"] or "", found["language"], textwrap.dedent(found["text"]))
        for found in _BLOCK.finditer(text)
    ]


def marked(page: str, mark: str) -> list[str]:
    """Return the texts of the blocks with this mark, in order."""
    texts = [block.text for block in blocks(page) if block.mark == mark]
    assert texts, f"{page} has no block marked {mark!r}"
    return texts


async def paste(script: str, folder: Path, **environment: str) -> str:
    """Run lines in bash; each must succeed. Return what they print on standard output."""
    out, _ = await paste_both(script, folder, **environment)
    return out


async def paste_both(script: str, folder: Path, **environment: str) -> tuple[str, str]:
    """Run lines in bash; each must succeed. Return standard output and standard error."""
    programs = f"{sys.prefix}/bin"
    process = await asyncio.create_subprocess_exec(
        *("bash", "-euo", "pipefail", "-c", script.replace(".venv/bin", programs)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=folder,
        env={
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(folder),
            "LANG": "C.UTF-8",
            **environment,
        },
    )
    try:
        async with asyncio.timeout(SECONDS):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, (out + err).decode()
    return out.decode(), err.decode()
