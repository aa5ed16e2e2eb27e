"""Ends a worker whose memory grows past all reason, before the machine suffers.

`native` (0.5.0) keeps a message of any size, and unpacks a compressed one, before it can be
refused; and whoever takes no answers has them kept. The worker is ended at once, as by a crash: it
cannot give the memory back, and all that it would still do takes more. The supervisor starts
another.

Not a limit of the kernel on what a process may map (RLIMIT_DATA, RLIMIT_AS): `native` maps the room
for a message by what five bytes say that its size will be, 4 GiB at most, so that every client
could end a worker with five bytes. And not a graceful stop, for the memory that is left.
"""

import asyncio
import os
import sys
from typing import Final

from latchkey_service.config import Settings
from latchkey_service.log import logger

__all__ = ["guard_memory", "memory_max_bytes"]

MIB: Final = 1024 * 1024
# Unpacking fills some 500 MB a second: this is noticed some 50 MB late. A look takes 10 µs.
LOOK_SECONDS: Final = 0.1
# A worker without load takes some 100 MB. The rest is for messages and answers on their way.
BASE_MIB: Final = 1024
# Twice what they take, for what an allocator cannot give back.
ENTRY_BYTES: Final = 1_000
CONNECTION_BYTES: Final = 100_000
EXIT_CODE: Final = 70  # EX_SOFTWARE


def memory_max_bytes(settings: Settings) -> int:
    """Return how much memory a worker may have resident."""
    if settings.memory_mib is not None:
        return settings.memory_mib * MIB
    listeners = 1 if settings.tls_listen is None else 2
    return (
        BASE_MIB * MIB
        + settings.cache_entries * ENTRY_BYTES
        + settings.connections_max * listeners * CONNECTION_BYTES
    )


async def guard_memory(bytes_max: int) -> None:
    """End this process when it has more memory resident. Ends when cancelled. Linux only."""
    if sys.platform != "linux" or not bytes_max:
        return
    page = os.sysconf("SC_PAGESIZE")
    file = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        while True:
            # Pages in all, pages resident, ...
            resident = int(os.pread(file, 100, 0).split()[1]) * page
            if resident > bytes_max:
                logger().critical(
                    "worker ends: too much memory", mib=resident // MIB, limit_mib=bytes_max // MIB
                )
                os._exit(EXIT_CODE)
            await asyncio.sleep(LOOK_SECONDS)
    finally:
        os.close(file)
