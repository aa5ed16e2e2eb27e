"""Runs the command line tool as a process that a fork server starts."""

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.fork_server import Forked

__all__ = ["NOWHERE", "PRELOADED", "PYTHON", "Result", "Run", "make_run"]

# What the tool and the commands of the service import, some of it only when a command needs it.
PRELOADED = (
    "encodings.idna",
    "grpc.aio",
    "latchkey_cli.access",
    "latchkey_cli.bulk",
    "latchkey_cli.documents",
    "latchkey_cli.main",
    "latchkey_cli.session",
    "latchkey_cli.tables",
    "latchkey_service.access.command",
    "latchkey_service.process.commands",
    "latchkey_service.process.doctor",
    "latchkey_service.process.worker",
    "latchkey_service.settings.settings",
    "pydantic.type_adapter",
    "rich.live",
    "rich.table",
    "stringprep",
    "typer._adapters",
    "typer.rich_utils",
)
# The tool as users start it, for tests of what happens while it starts.
PYTHON = (sys.executable, "-m", "latchkey_cli")

# Far longer than a command takes on a busy machine.
TIMEOUT_SECONDS = 20
# Nothing listens on this reserved port (RFC 6335 §6).
NOWHERE = "127.0.0.1:1"


@dataclass(frozen=True)
class Result:
    """The result of one run of the tool."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> Any:
        return json.loads(self.err)["error"]


Run = Callable[..., Awaitable[Result]]


def make_run(folder: Path, forked: Forked) -> Run:
    """Return a function that runs the tool in `folder`. It kills the tool at the timeout."""

    async def run(
        *arguments: str,
        target: str = NOWHERE,
        stdin: str | bytes = b"",
        stdout: int = asyncio.subprocess.PIPE,
        command: tuple[str, ...] = forked("latchkey_cli"),
        **environment: str,
    ) -> Result:
        process = await asyncio.create_subprocess_exec(
            *command,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=stdout,
            stderr=asyncio.subprocess.PIPE,
            cwd=folder,
            env={
                "PATH": os.defpath,
                "HOME": str(folder),
                "LANG": "C.UTF-8",
                "TZ": "UTC",
                "LATCHKEY_TARGET": target,
                "LATCHKEY_ACCOUNT": "acme",
                **environment,
            },
        )
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                data = stdin.encode() if isinstance(stdin, str) else stdin
                out, err = await process.communicate(data)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        assert b"Traceback" not in err
        return Result(process.returncode, (out or b"").decode(), err.decode())

    return run
