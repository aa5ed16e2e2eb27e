"""docs/troubleshooting.md quotes messages that the programs print."""

import ast
import re
from functools import cache

from tests.helpers.repository import ROOT

PAGE = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
SOURCES = ("service/latchkey_service", "clients/python/latchkey", "clients/cli", "clients/console")
# Rows of the last table describe what a caller of a guard sees.
QUOTED = PAGE.partition("\n## Guards\n")[0]
MESSAGES = re.findall(r"^\| `([^`]+)` \|", QUOTED, re.MULTILINE)
# Stands for a value in a message.
GAP = "…"


@cache
def texts() -> frozenset[str]:
    """Return all texts in the programs, with a gap for each value that is put in."""
    found = set()
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = [
                        str(part.value) if isinstance(part, ast.Constant) else GAP
                        for part in node.values
                    ]
                    found.add("".join(parts))
    return frozenset(found)


def is_printed(message: str) -> bool:
    """Whether some text of the programs contains the message, as it stands."""
    return any(message in text for text in texts())


def test_messages_exist() -> None:
    """A program can print each quoted message."""
    assert [message for message in MESSAGES if not is_printed(message)] == []


def test_the_check_can_fail() -> None:
    """A message that no program prints is found."""
    assert len(MESSAGES) > 15
    assert not is_printed("cannot listen on … because the moon is full")
