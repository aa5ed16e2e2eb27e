"""Starts the process of a worker, and writes to it.

Owns its environment and its folder for temporary files. `supervisor.py` decides when a worker
starts and ends.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from latchkey_service.postgres.embedded_host import OsAccount
from latchkey_service.process.privileges import ACCOUNT_VARIABLE, home_of
from latchkey_service.process.worker_watch import HEARTBEAT_VARIABLE
from latchkey_service.settings.exposure import transport_of
from latchkey_service.settings.logs import logger
from latchkey_service.settings.settings import Settings
from latchkey_service.transport import tls

__all__ = ["NotStarted", "policy_line", "send", "spawn", "temporary_folder"]


# A worker's answer to a request for its metrics, which takes about 200 kB for all methods.
ANSWER_BYTES_MAX: Final = 4 * 1024 * 1024


class NotStarted(Exception):
    """A worker could not be started. Usually transient, for example when memory is short, which may
    also have killed the previous one."""


async def spawn(
    folder: str | None,
    heartbeats: int,
    account: OsAccount | None,
    more_variables: Mapping[str, str],
) -> asyncio.subprocess.Process:
    """Start a worker with `folder` as its directory for temporary files.

    The worker writes heartbeats to the file `heartbeats`. Once it listens, it becomes `account`, if
    there is one. Raises OSError, RuntimeError or
    MemoryError if there is no process, pipe, file, memory or thread for it.
    """
    # Clients can send thousands of frames for which grpcio's core logs a line each.
    environment = {"GRPC_VERBOSITY": "ERROR", **os.environ}
    if folder is not None:
        environment["TMPDIR"] = folder
    # Our own TLS version comes last: nothing in our environment may allow an older one.
    environment |= {HEARTBEAT_VARIABLE: str(heartbeats), **more_variables, **tls.ENVIRONMENT}
    environment.pop(ACCOUNT_VARIABLE, None)
    if account is not None:
        environment[ACCOUNT_VARIABLE] = f"{account.uid}:{account.gid}"
        # From the start, so that the database's driver finds the same files before and after.
        environment["HOME"] = home_of(account)
    return await asyncio.create_subprocess_exec(
        sys.executable,
        # Keeps the current directory off the path: otherwise a stray asyncpg.py would be imported.
        "-P",
        "-m",
        "latchkey_service",
        "worker",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        limit=ANSWER_BYTES_MAX,
        pass_fds=(heartbeats,),
        env=environment,
        # Ctrl-C must reach only the supervisor, which stops the workers in order.
        start_new_session=True,
    )


# The kernel's limit for the path of a UNIX socket is 108, with a zero byte at the end.
SOCKET_PATH_BYTES_MAX: Final = 107
# What `native` adds to a worker's folder: a folder with a random name, and its socket.
NATIVE_PATH: Final = "/pygrpc-native-XXXXXXXX/fallback.sock"


@contextlib.contextmanager
def temporary_folder(settings: Settings) -> Iterator[str | None]:
    """Create a directory for a worker's temporary files, such as the socket of `native`.

    Deletes it afterwards, even if the worker was killed. Raises NotStarted.
    """
    if transport_of(settings) != "native":
        yield None
        return
    try:
        folder = tempfile.TemporaryDirectory(prefix="lk-", ignore_cleanup_errors=True)
    except OSError as error:
        raise NotStarted(str(error)) from error
    with folder as path:
        excess = len(os.fsencode(path)) + len(NATIVE_PATH) - SOCKET_PATH_BYTES_MAX
        if excess > 0:
            parent = Path(path).parent
            most = len(os.fsencode(parent)) - excess
            raise NotStarted(
                f"the folder for temporary files is {parent}, and its path may have {most} "
                "characters at most, because the path of a socket is limited; set TMPDIR to a "
                "shorter one, or LATCHKEY_TRANSPORT=grpcio"
            )
        yield path


def send(process: asyncio.subprocess.Process, *lines: bytes) -> int:
    """Write lines to a worker without waiting. Return how many bytes it has not read yet.

    Does not raise, because the other workers need the lines too. If the lines cannot be written,
    returns a number that is above every limit.
    """
    assert process.stdin is not None, "it is a pipe"  # noqa: S101 - for the type checker
    try:
        process.stdin.writelines(lines)
        return process.stdin.transport.get_write_buffer_size()
    except Exception as error:  # noqa: BLE001 - see above
        logger().error("a worker's pipe failed", pid=process.pid, error=type(error).__name__)
        return sys.maxsize


def policy_line(text: str | None) -> bytes:
    """Return the line that sends a policy to a worker; None: there is no policy."""
    return json.dumps(text, ensure_ascii=False).encode() + b"\n"
