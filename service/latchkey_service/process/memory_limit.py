"""Kills a worker that uses far too much memory, before the machine runs out.

`native` (0.5.0) buffers a message of any size, and decompresses it, before it can be rejected. It
also keeps the answers for clients that do not read. The worker exits at once, as in a crash: it
cannot give the memory back, and continuing would only use more. The supervisor starts another one.

A kernel limit on mapped memory (RLIMIT_DATA, RLIMIT_AS) would not work. `native` maps memory for a
message by the size in its first five bytes, up to 4 GiB, so any client could kill a worker with
five bytes. A graceful stop would not work either, with so little memory left.
"""

import asyncio
import os
import sys
from typing import Final

from latchkey_service.settings.logs import logger
from latchkey_service.settings.settings import Settings

__all__ = ["guard_memory", "memory_max_bytes"]

MIB: Final = 1024 * 1024
# Decompression fills some 500 MB a second, so detection is some 50 MB late. A check takes 10 µs.
LOOK_SECONDS: Final = 0.1
# An idle worker uses some 100 MB. The rest is for messages and answers in transit.
BASE_MIB: Final = 1024
# Twice their real size, because an allocator cannot return all freed memory.
ENTRY_BYTES: Final = 1_000
CONNECTION_BYTES: Final = 100_000
EXIT_CODE: Final = 70  # EX_SOFTWARE


def memory_max_bytes(settings: Settings) -> int:
    """Return the limit of a worker's resident memory."""
    if settings.memory_mib is not None:
        return settings.memory_mib * MIB
    listeners = 1 if settings.tls_listen is None else 2
    return (
        BASE_MIB * MIB
        + settings.cache_entries * ENTRY_BYTES
        + settings.connections_max * listeners * CONNECTION_BYTES
    )


async def guard_memory(bytes_max: int) -> None:
    """Exit the process when its resident memory exceeds the limit. Linux only."""
    if sys.platform != "linux" or not bytes_max:
        return
    page = os.sysconf("SC_PAGESIZE")
    file = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        while True:
            # The fields are total pages, resident pages, ...
            resident = int(os.pread(file, 100, 0).split()[1]) * page
            if resident > bytes_max:
                logger().critical(
                    "worker exits: too much memory", mib=resident // MIB, limit_mib=bytes_max // MIB
                )
                os._exit(EXIT_CODE)
            await asyncio.sleep(LOOK_SECONDS)
    finally:
        os.close(file)
