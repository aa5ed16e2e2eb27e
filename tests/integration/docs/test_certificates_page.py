"""The OpenSSL commands of docs/certificates.md, run exactly as printed."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from pathlib import Path

from latchkey_service.settings.settings import Settings

from tests.helpers.programs import missing
from tests.helpers.repository import ROOT
from tests.helpers.servers import fresh_database, serving_as

PAGE = (ROOT / "docs/certificates.md").read_text("utf-8")
# Some commands of half a second each, on a busy machine.
SECONDS = 60.0


def commands(mark: str) -> str:
    """Return the commands with this mark, in order."""
    block = rf"^<!-- test: {mark} -->\n```bash\n(.*?)^```$"
    found = re.findall(block, PAGE, re.MULTILINE | re.DOTALL)
    assert found
    return "\n".join(found)


def keys_in(folder: Path) -> list[Path]:
    return list(folder.glob("*.key"))


async def bash(script: str, folder: Path, latchkey: Path) -> str:
    """Run commands; each must succeed. Return what they print."""
    process = await asyncio.create_subprocess_exec(
        *("bash", "-euo", "pipefail", "-c"),
        script.replace(".venv/bin/latchkey", str(latchkey)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"},
    )
    try:
        async with asyncio.timeout(SECONDS):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, said.decode()
    return said.decode()


async def test_the_commands_work_as_printed(
    tmp_path: Path, postgres_url: str, template_url: str, pepper_file: Path, latchkey: Path
) -> None:
    """OpenSSL finds the certificates good for their purposes. A service that uses them as the page
    says lets the caller in, and refuses it without its certificate."""
    if shutil.which("openssl") is None:
        missing("not installed here: openssl")
    said = await bash(commands("certificates"), tmp_path, latchkey)
    assert "server.pem: OK\n" in said
    assert "shop.pem: OK\n" in said
    modes = {path.name: path.stat().st_mode & 0o777 for path in keys_in(tmp_path)}
    assert modes == dict.fromkeys(("ca.key", "server.key", "shop.key"), 0o600)
    settings = Settings(
        database_url=await fresh_database(postgres_url),
        pepper_file=pepper_file,
        data_dir=tmp_path / "unused",
        listen="127.0.0.1:0",
        grace_seconds=0.2,
        policy=tmp_path / "policy.toml",
        tls_listen="127.0.0.1:0",
        tls_certificate=tmp_path / "server.pem",
        tls_key=tmp_path / "server.key",
        tls_client_ca=tmp_path / "ca.pem",
    )
    use = commands("certificates in use")
    async with serving_as(settings) as server:
        assert server.tls_address is not None
        use = use.replace(":50052", f":{server.tls_address.rpartition(':')[2]}")
        assert "exit code 5" in await bash(use, tmp_path, latchkey)
        without = use.replace("--tls-certificate shop.pem --tls-key shop.key", "")
        assert without != use
        assert "exit code 5" not in await bash(without, tmp_path, latchkey)


def test_every_command_is_run() -> None:
    """Each block of commands is marked."""
    assert PAGE.count("```bash\n") == PAGE.count("<!-- test: certificates") == 4
