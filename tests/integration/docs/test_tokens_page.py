"""The commands of docs/tokens.md, run exactly as printed, one after another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.documented import marked, paste_both
from tests.helpers.repository import ROOT

PAGE = (ROOT / "docs/tokens.md").read_text("utf-8")
COMMANDS = marked("docs/tokens.md", "token life")


@pytest.fixture
def transport() -> str:
    """The tool cannot tell the transports apart, so one is enough here."""
    return "native"


async def test_the_commands_work_as_printed(address: str, tmp_path: Path, latchkey: Path) -> None:
    """A reader who pastes all commands sees what the page says: the verdicts in this order, two
    secrets while both work, and no token left at the end."""
    script = "\n".join(COMMANDS).replace(".venv/bin/latchkey", str(latchkey))
    assert ".venv" not in script
    output, errors = await paste_both(script, tmp_path, LATCHKEY_TARGET=address)
    verdicts = re.findall(
        r"^(VALID|DISABLED|EXPIRED|ADDRESS_NOT_ALLOWED|INSUFFICIENT_PERMISSIONS|RATE_LIMITED)"
        r"(?=:)"
        r"|^(exit code \d+)$",
        output,
        re.MULTILINE,
    )
    assert [verdict or code for verdict, code in verdicts] == [
        "VALID",
        *("ADDRESS_NOT_ALLOWED", "exit code 5"),
        *("VALID", "VALID"),
        *("EXPIRED", "exit code 5", "VALID"),
        *("VALID", "INSUFFICIENT_PERMISSIONS", "exit code 5"),
        *("VALID", "VALID", "RATE_LIMITED", "exit code 5"),
        *("DISABLED", "exit code 5"),
    ]
    assert "line 1: ended\n" in output
    assert "Deleted 1 token\n" in output
    secrets = [(tmp_path / name).read_text() for name in ("export.secret", "export.secret.new")]
    assert all(re.fullmatch(r"lk_[0-9A-Za-z]{57}\n", secret) for secret in secrets)
    for secret in secrets:
        assert secret.strip() not in output + errors


def test_every_command_is_run() -> None:
    """Each block of commands is marked, and no line puts a secret on a command line."""
    assert PAGE.count("```bash\n") == len(COMMANDS) > 8
    assert "$SECRET" not in PAGE
