"""One server process under the supervisor: serve until told to stop.

Its settings come from the environment, and its peppers by standard input, so that a worker that is
started again has those that the supervisor has checked, whatever became of the file since.

It is told by SIGTERM, or by the end of its standard input, which the supervisor holds open: so a
worker never outlives a supervisor that was killed.
"""

import asyncio
import contextlib
import gc
import resource
import signal
import sys

import uvloop

from latchkey_service import log, peppers
from latchkey_service.config import READY, Settings, load
from latchkey_service.secrets import Keyring
from latchkey_service.server import running

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
        return uvloop.run(_serve(settings, keyring))
    except (peppers.PepperFileError, RuntimeError, OSError) as error:
        # What a worker cannot start without: its keys, its address.
        log.logger().error("worker cannot start", error=str(error))
        return 1


def _allow_connections() -> None:
    """Raise the limit on open files as far as it goes: a client that watches takes three."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS has a limit below its "no limit"
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _serve(settings: Settings, keyring: Keyring) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    orphaned = False

    def supervisor_is_gone() -> None:
        nonlocal orphaned
        orphaned = True
        loop.remove_reader(sys.stdin)
        stop.set()

    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, stop.set)
    loop.add_reader(sys.stdin, supervisor_is_gone)
    async with running(settings, keyring) as server:
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
    return 0
