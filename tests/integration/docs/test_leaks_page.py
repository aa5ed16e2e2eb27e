"""The commands of docs/leaks.md, run exactly as printed, one after another."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tests.helpers.documented import marked, paste
from tests.helpers.free_ports import free_port
from tests.helpers.programs import missing
from tests.helpers.repository import ROOT
from tests.helpers.tool import NOWHERE

PAGE = (ROOT / "docs/leaks.md").read_text("utf-8")
BLOCK = re.compile(r"^<!-- test: leaks -->\n```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A few commands of half a second each, and the start of the receiver, on a busy machine.
SECONDS = 60.0


@pytest.fixture
def transport() -> str:
    """The tool cannot tell the transports apart, so one is enough here."""
    return "native"


async def test_the_commands_work_as_printed(address: str, tmp_path: Path, latchkey: Path) -> None:
    """A reader who pastes all commands sees both labels and a dead secret, which no log contains.
    OpenSSL signs the report, so the format of signatures is not only ours."""
    if absent := [name for name in ("curl", "jq", "openssl") if shutil.which(name) is None]:
        missing(f"not installed here: {', '.join(absent)}")
    # The receiver is the installed one, because a signal ends it.
    script = "\n".join(BLOCK.findall(PAGE))
    script = re.sub(r"\.venv/bin/latchkey(?! receiver)", str(latchkey), script)
    script = script.replace(".venv/bin/", f"{sys.prefix}/bin/")
    script = script.replace("127.0.0.1:50090", f"127.0.0.1:{free_port()}")
    process = await asyncio.create_subprocess_exec(
        *("bash", "-euo", "pipefail", "-c", "trap 'kill %1; wait %1' EXIT\n" + script),
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
        process_group=0,
    )
    try:
        async with asyncio.timeout(SECONDS):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.communicate()
    output = out.decode() + err.decode()
    assert process.returncode == 0, output
    assert re.findall(r"^(?:true|false)_positive$", output, re.MULTILINE) == [
        *("true_positive", "false_positive")
    ]
    assert re.search(r"^EXPIRED:", output, re.MULTILINE)
    assert re.search(r"^ *Leak +reported ", output, re.MULTILINE)
    assert "ok\n" in output
    assert "found at https://example.com/config.py" in output
    assert (tmp_path / "leaked.secret").read_text().strip() not in output


def test_every_command_is_run() -> None:
    """Each block of commands is marked."""
    assert PAGE.count("```bash\n") == len(BLOCK.findall(PAGE)) + 1 == 4


async def test_the_receiver_starts_as_printed(tmp_path: Path, latchkey: Path) -> None:
    """The command of the instructions fetches the scanner's keys, and is then ready for reports."""
    if absent := [name for name in ("curl", "jq", "openssl") if shutil.which(name) is None]:
        missing(f"not installed here: {', '.join(absent)}")
    (command,) = marked("docs/leaks.md", "receiver")
    keys, port = free_port(), free_port()
    endpoint = "https://api.github.com/meta/public_keys/secret_scanning"
    for printed, ours in (
        (endpoint, f"http://127.0.0.1:{keys}/keys.json"),
        ("127.0.0.1:50090", f"127.0.0.1:{port}"),
        ("latchkey.internal:50051", NOWHERE),
    ):
        assert command.count(printed) == 1
        command = command.replace(printed, ours)
    script = [
        "trap 'kill $(jobs -p); wait' EXIT",
        f"(umask 077; {latchkey} policy new-caller receiver --role revoker >receiver.credential)",
        marked("docs/leaks.md", "leaks")[0],
        f"python -m http.server {keys} --bind 127.0.0.1 >served 2>&1 &",
        f"until curl --silent --output /dev/null http://127.0.0.1:{keys}/; do sleep 0.1; done",
        f"{command.strip()} >received 2>&1 &",
        f"until curl --silent --fail http://127.0.0.1:{port}/healthz; do sleep 0.1; done",
    ]
    assert (await paste("\n".join(script), tmp_path)).endswith("ok\n")
