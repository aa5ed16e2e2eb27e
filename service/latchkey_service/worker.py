"""One server process under the supervisor: serve until told to stop.

Its settings, its peppers and its policy come by standard input, a line each, so that a worker that
is started again has those that the supervisor has checked, whatever became of the files and of
`.env` since. Each line after that is another policy, to be put in force.

It is told by SIGTERM, or by the end of its standard input, which the supervisor holds open: so a
worker never outlives a supervisor that was killed.
"""

import asyncio
import contextlib
import gc
import json
import resource
import signal
import sys
from functools import partial
from typing import Any

import uvloop

from latchkey_service import log, peppers, tls
from latchkey_service.access.policy import PolicyError
from latchkey_service.access.policy_file import SIZE_MAX
from latchkey_service.config import READY, Settings, from_json
from latchkey_service.memory_guard import guard_memory, memory_max_bytes
from latchkey_service.secrets import Keyring
from latchkey_service.server import Server, ended, running
from latchkey_service.transport import limits_of

__all__ = ["main"]

# Nobody waits for an orphan, and the next start wants its address.
ORPHAN_GRACE_SECONDS = 0.5
# A policy that is right is at most twice as long as JSON: quotes, backslashes and ends of lines.
LINE_MAX = 2 * SIZE_MAX + 1024
# Python's own are (700, 10, 10): a collection every few calls.
GC_THRESHOLDS = (20_000, 20, 50)


def main() -> int:
    """Serve and return the exit code. Raises ConfigError."""
    # Sent to all of a service's processes, it is for the supervisor alone.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _allow_connections()
    try:
        return uvloop.run(_run())
    except (
        peppers.PepperFileError,
        PolicyError,
        tls.TlsError,
        RuntimeError,
        OSError,
    ) as error:
        # What a worker cannot start without: its keys, its policy, its addresses.
        log.logger().error("worker cannot start", error=str(error))
        return 1


async def _run() -> int:
    handed = asyncio.StreamReader(limit=LINE_MAX)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(handed), sys.stdin
    )
    settings = from_json(await handed.readline())
    log.configure(log.form(settings.log_format), settings.log_level)
    keyring = peppers.parse((await handed.readline()).decode("ascii", "replace"))
    policy = _policy(await handed.readline())
    tls.allow_only_tls_1_3()
    _warn_of_files(settings)
    return await _serve(settings, keyring, policy, handed)


class _Policies:
    """The texts of policies that the supervisor hands over, the newest of which is to be in force.

    Belongs to the event loop.
    """

    def __init__(self, handed: asyncio.StreamReader, text: str | None) -> None:
        self._handed = handed
        self._text = self._in_force = text
        self._server: Server | None = None

    def latest(self) -> str | None:
        """Return the newest, which the caller puts in force."""
        self._in_force = self._text
        return self._text

    async def put_in_force(self, server: Server) -> None:
        """Put what has come meanwhile in force, and from now on what comes."""
        while self._in_force != self._text and (text := self.latest()) is not None:
            await server.take_policy(text)
        # Nothing is awaited in between: what comes from here on is the server's at once. Until
        # then `take` only notes it, or an older one might come in force after a newer one.
        self._server = server

    async def take(self) -> None:
        """Take them until the supervisor is gone. Raises PolicyError."""
        # Without its end it is a part of a line, and all that will ever come of it.
        while (line := await self._handed.readline()).endswith(b"\n"):
            self._text = text = _policy(line)
            if self._server is not None:
                await self._server.take_policy(text)


def _policy(line: bytes) -> Any:
    """Return the policy's text, or None for none. Raises PolicyError."""
    try:
        return json.loads(line)
    except ValueError:
        raise PolicyError("no policy came from the supervisor") from None


def _allow_connections() -> None:
    """Raise the limit on open files as far as it goes: a client that watches takes three."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS has a limit below its "no limit"
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _warn_of_files(settings: Settings) -> None:
    """Say when there cannot be as many connections as the settings allow."""
    limits = limits_of(settings)
    if limits.connections_max < settings.connections_max:
        asked = "connections_max" in settings.model_fields_set
        (log.logger().warning if asked else log.logger().info)(
            "fewer connections: the limit on open files is low",
            connections_max=limits.connections_max,
            open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        )


async def _serve(
    settings: Settings, keyring: Keyring, policy: str | None, handed: asyncio.StreamReader
) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    orphaned = failed = False

    def fail() -> None:
        """End, for the supervisor to start another worker, which is whole."""
        nonlocal failed
        failed = True
        stop.set()

    async def take_policies() -> None:
        """Take what the supervisor hands over until it is gone."""
        nonlocal orphaned
        await policies.take()
        orphaned = True
        stop.set()

    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, stop.set)
    # To the very end: calls go on while it stops.
    guarding = asyncio.create_task(guard_memory(memory_max_bytes(settings)))
    guarding.add_done_callback(partial(ended, fail))
    # It too: a right that is taken away is gone for calls that go on. And from now on, or it would
    # serve at first by what has been changed while it started.
    policies = _Policies(handed, policy)
    taking = asyncio.create_task(take_policies(), name="take_policies")
    taking.add_done_callback(partial(ended, fail))
    async with running(settings, keyring, policies.latest, fail) as server:
        await policies.put_in_force(server)
        # What is loaded by now stays: the collector need not look at it again and again. And what
        # a call leaves is freed by reference counts, so it may look less often.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        sys.stdout.buffer.write(READY)
        sys.stdout.buffer.flush()
        await stop.wait()
        if orphaned:
            log.logger().warning("the supervisor is gone: stopping")
            await server.stop(ORPHAN_GRACE_SECONDS)
    taking.cancel()
    guarding.cancel()
    return 1 if failed else 0
