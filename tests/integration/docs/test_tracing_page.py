"""The command of docs/tracing.md, run as printed, sends spans to a collector."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.helpers.documented import marked
from tests.helpers.free_ports import free_port
from tests.helpers.trace_collector import collecting
from tests.helpers.waiting import WAIT_SECONDS, eventually

DOCUMENTED = "http://127.0.0.1:4318"
# Starts Python twice, on a busy machine.
START_SECONDS = 60.0


async def test_the_command_works_as_printed(
    database_url: str, pepper_file: Path, tmp_path: Path
) -> None:
    """The service that the command starts sends the span of a call to the collector."""
    (command,) = marked("docs/tracing.md", "traces")
    assert command.count(DOCUMENTED) == 1
    address = f"127.0.0.1:{free_port()}"
    async with collecting() as collector:
        command = command.replace(DOCUMENTED, collector.url)
        process = await asyncio.create_subprocess_exec(
            *("bash", "-euc", command.replace(".venv/bin", f"{sys.prefix}/bin")),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            cwd=tmp_path,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(tmp_path),
                "LANG": "C.UTF-8",
                "LATCHKEY_DATABASE_URL": database_url,
                "LATCHKEY_PEPPER_FILE": str(pepper_file),
                "LATCHKEY_LISTEN": address,
            },
            process_group=0,
        )
        try:
            async with grpc.aio.insecure_channel(address) as channel:
                stub = pb_grpc.TokenServiceStub(channel)

                async def listed() -> bool:
                    assert process.returncode is None
                    try:
                        await stub.List(pb.ListRequest(account_id="acme"), timeout=5)
                    except grpc.aio.AioRpcError:
                        return False
                    return True

                await eventually(listed, "it serves", START_SECONDS)
            # A stopping service sends its last spans.
            os.killpg(process.pid, signal.SIGTERM)
            async with asyncio.timeout(WAIT_SECONDS):
                await process.wait()
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        ((resource, _),) = collector.named("latchkey.v1.TokenService/List")
        assert resource["service.name"] == "latchkey"
