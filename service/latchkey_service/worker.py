"""One server process under the supervisor: serve until told to stop.

Its settings come from the environment, its peppers and its policy by standard input, a line each,
so that a worker that is started again has those that the supervisor has checked, whatever became of
the files since. On SIGHUP it reads the policy file again.

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

import uvloop

from latchkey_service import log, peppers, tls
from latchkey_service.access.policy import PolicyError
from latchkey_service.config import READY, Settings, load
from latchkey_service.memory_guard import guard_memory, memory_max_bytes
from latchkey_service.secrets import Keyring
from latchkey_service.server import Server, ended, running
from latchkey_service.transport import limits_of

__all__ = ["main"]

# Nobody waits for an orphan, and the next start wants its address.
ORPHAN_GRACE_SECONDS = 0.5
# Python's own are (700, 10, 10): a collection every few calls.
GC_THRESHOLDS = (20_000, 20, 50)


def main() -> int:
    """Serve and return the exit code."""
    settings = load()
    _allow_connections()
    log.configure(log.form(settings.log_format), settings.log_level)
    try:
        keyring = peppers.parse(sys.stdin.buffer.readline().decode("ascii"))
        policy: str | None = json.loads(sys.stdin.buffer.readline())
        tls.allow_only_tls_1_3()
        _warn_of_files(settings)
        return uvloop.run(_serve(settings, keyring, policy))
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


async def _serve(settings: Settings, keyring: Keyring, policy: str | None) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    orphaned = failed = False

    def fail() -> None:
        """End, for the supervisor to start another worker, which is whole."""
        nonlocal failed
        failed = True
        stop.set()

    def supervisor_is_gone() -> None:
        nonlocal orphaned
        orphaned = True
        loop.remove_reader(sys.stdin)
        stop.set()

    # Ignored until there is something to read again.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, stop.set)
    loop.add_reader(sys.stdin, supervisor_is_gone)
    # To the very end: calls go on while it stops.
    guarding = asyncio.create_task(guard_memory(memory_max_bytes(settings)))
    guarding.add_done_callback(partial(ended, fail))
    async with running(settings, keyring, policy, fail) as server:
        # What is loaded by now stays: the collector need not look at it again and again. And what
        # a call leaves is freed by reference counts, so it may look less often.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        reload = asyncio.Event()
        loop.add_signal_handler(signal.SIGHUP, reload.set)
        reloading = asyncio.create_task(_reload(server, reload))
        sys.stdout.buffer.write(READY)
        sys.stdout.buffer.flush()
        await stop.wait()
        reloading.cancel()
        if orphaned:
            log.logger().warning("the supervisor is gone: stopping")
            await server.stop(ORPHAN_GRACE_SECONDS)
    guarding.cancel()
    return 1 if failed else 0


async def _reload(server: Server, asked: asyncio.Event) -> None:
    """Read the policy again whenever asked to."""
    while True:
        await asked.wait()
        asked.clear()
        if server.policy_file is not None:
            await server.policy_file.reload()
