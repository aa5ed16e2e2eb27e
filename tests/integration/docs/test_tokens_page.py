"""The commands of docs/tokens.md, run exactly as printed, one after another."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import pytest

from tests.helpers.repository import ROOT

PAGE = (ROOT / "docs/tokens.md").read_text("utf-8")
BLOCK = re.compile(r"^<!-- test: token life -->\n```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# About twenty commands of half a second each, on a busy machine.
SECONDS = 90.0


@pytest.fixture
def transport() -> str:
    """The tool cannot tell the transports apart, so one is enough here."""
    return "native"


async def test_the_commands_work_as_printed(address: str, tmp_path: Path, latchkey: Path) -> None:
    """A reader who pastes all commands sees what the page says: the verdicts in this order, two
    secrets while both work, and no token left at the end."""
    script = "\n".join(BLOCK.findall(PAGE)).replace(".venv/bin/latchkey", str(latchkey))
    assert ".venv" not in script
    process = await asyncio.create_subprocess_exec(
        *("bash", "-euo", "pipefail", "-c", script),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "LANG": "C.UTF-8",
            "LATCHKEY_TARGET": address,
        },
    )
    try:
        async with asyncio.timeout(SECONDS):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    output = out.decode()
    assert process.returncode == 0, output + err.decode()
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
        assert secret.strip() not in output + err.decode()


def test_every_command_is_run() -> None:
    """Each block of commands is marked, and no line puts a secret on a command line."""
    assert PAGE.count("```bash\n") == len(BLOCK.findall(PAGE)) > 8
    assert "$SECRET" not in PAGE
