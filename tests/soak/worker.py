"""`python -m tests.soak.worker`: the shipped service, with extra reports from its workers, and
optionally a planted leak that the soak must find.
"""

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from latchkey_coherence import verdict_cache
from latchkey_service.__main__ import main
from latchkey_service.coherence import recent_log
from latchkey_service.process import periodic
from latchkey_service.rpc.counters import Counts
from latchkey_service.tokens import imported
from latchkey_service.tokens.lifecycle import Lifecycle

from tests.helpers.child_processes import end_with_parent

LEAK_VARIABLE = "LATCHKEY_SOAK_LEAK"
SUMMARY_VARIABLE = "LATCHKEY_SOAK_SUMMARY_SECONDS"
MODULE = "tests.soak.worker"
# The bound of each structure that otherwise fills for minutes and would look like a leak. Small, so
# that it is reached while the service warms up. The size of the cache is a setting.
BOUND = 1_000
# Large, because the leaks must show within seconds, among connections that open and close.
LEAKED_BYTES = 1_000_000
LEAKED_EACH = 10
LEAKS: dict[str, Callable[[], object]] = {
    # Not zeros, which use no memory until they are written to.
    "memory": lambda: b"x" * LEAKED_BYTES,
    "descriptors": lambda: [os.open(os.devnull, os.O_RDONLY) for _ in range(LEAKED_EACH)],
    "tasks": lambda: [asyncio.create_task(asyncio.Event().wait()) for _ in range(LEAKED_EACH)],
}
_leaked: list[Any] = []


def _supervise() -> int:
    # A graceful end, because it has workers to stop.
    end_with_parent(signal.SIGTERM)
    spawn = asyncio.create_subprocess_exec

    async def spawn_ours(*argv: str, **options: Any) -> asyncio.subprocess.Process:
        mine = [MODULE if each == "latchkey_service" else each for each in argv]
        return await spawn(*mine, **options)

    asyncio.create_subprocess_exec = spawn_ours  # type: ignore[assignment]  # as below
    return main([])


def _work() -> int:
    end_with_parent()
    periodic.SUMMARY_SECONDS = float(os.environ[SUMMARY_VARIABLE])
    verdict_cache.HISTORY_MAX = BOUND  # type: ignore[misc]  # what this module is for
    recent_log.HISTORY_MAX = BOUND  # type: ignore[attr-defined]  # as above
    imported.ABSENT_MAX = BOUND  # type: ignore[misc]  # as above
    take = Counts.take

    def take_more(counts: Counts) -> dict[str, int]:
        # Collect garbage first, because objects that only wait for the collector, which runs every
        # few minutes, would hide growth. The product does not do this: with a large cache, both
        # would delay a verify.
        gc.collect()
        return take(counts) | {"objects": len(gc.get_objects())}

    Counts.take = take_more  # type: ignore[assignment, method-assign]  # what this module is for
    if leaks := os.environ.get(LEAK_VARIABLE):
        _plant(leaks.split(","))
    return main(["worker"])


def _plant(leaks: Sequence[str]) -> None:
    """Make each Create leak something."""
    create = Lifecycle.create

    async def leaking(self: Lifecycle, *arguments: Any) -> Any:
        _leaked.extend(LEAKS[leak]() for leak in leaks)
        return await create(self, *arguments)

    Lifecycle.create = leaking  # type: ignore[assignment, method-assign]  # what this module is for


if __name__ == "__main__":
    sys.exit(_work() if sys.argv[1:] == ["worker"] else _supervise())
