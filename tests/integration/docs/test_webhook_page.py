"""The receiver in docs/webhook.md, run as printed, gets events from a real service."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import sys
from pathlib import Path

import grpc
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.settings.settings import Settings
from pydantic import SecretStr

from tests.helpers.free_ports import free_port
from tests.helpers.programs import missing
from tests.helpers.repository import ROOT
from tests.helpers.servers import make_settings, serving
from tests.helpers.waiting import WAIT_SECONDS, eventually

PAGE = (ROOT / "docs/webhook.md").read_text("utf-8")
PROGRAM, COMMANDS = re.findall(
    r"^<!-- test: webhook -->\n```(?:python|bash)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL
)
PORT = 8080


@pytest.fixture
def settings(database_url: str, pepper_file: Path, tmp_path: Path) -> Settings:
    """The settings that the last command gives to the service."""
    (given,) = re.findall(
        r"^(LATCHKEY_\S+ LATCHKEY_\S+) \S+latchkey serve$", COMMANDS, re.MULTILINE
    )
    values = dict(pair.removeprefix("LATCHKEY_").lower().split("=") for pair in given.split())
    url = values["webhook_url"].replace(str(PORT), str(free_port()))
    return make_settings(database_url, pepper_file, "native").model_copy(
        update={
            "webhook_url": SecretStr(url),
            "webhook_secret_file": tmp_path / values["webhook_secret_file"],
        }
    )


async def test_the_receiver_works_as_printed(settings: Settings, tmp_path: Path) -> None:
    """The printed receiver checks the signature of a real event and prints it."""
    if shutil.which("openssl") is None:
        missing("not installed here: openssl")
    assert settings.webhook_url is not None
    port = settings.webhook_url.get_secret_value().rpartition(":")[2].strip("/")
    (tmp_path / "receiver.py").write_text(PROGRAM.replace(str(PORT), port))
    # The first two commands; the service of the third one runs in this process.
    commands = "\n".join(COMMANDS.splitlines()[:2]).replace(".venv/bin/python", sys.executable)
    process = await asyncio.create_subprocess_exec(
        *("bash", "-euo", "pipefail", "-c", commands + "\nwait"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"},
        process_group=0,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            await eventually(lambda: _listens(int(port)), "the receiver listens")
            async with serving(settings) as address, grpc.aio.insecure_channel(address) as channel:
                stub = pb_grpc.TokenServiceStub(channel)
                request = pb.CreateRequest(account_id="acme", name="export", scope=pb.SCOPE_READ)
                created = await stub.Create(request, timeout=9)
                lines = [await process.stdout.readline()]
                delete = pb.DeleteRequest(account_id="acme", id=created.token.id)
                await stub.Delete(delete, timeout=9)
                lines.append(await process.stdout.readline())
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        await process.communicate()
    assert lines == [b"token.created export\n", b"token.deleted export\n"]


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False


def test_the_receiver_is_short() -> None:
    """The receiver has about ten lines."""
    assert len([line for line in PROGRAM.splitlines() if line]) <= 12
