"""Clients that watch: many of the library's verifiers in one process. A script: address and number.

It answers a line on standard input once all of them watch. When the input closes, it closes them
and ends.
"""

import asyncio
import contextlib
import os
import resource
import sys

from latchkey import Verifier

from tests.benchmarks.coherence_memory import watches

# Few at a time, so that none waits so long for its first grant that it gives the server up.
AT_ONCE = 25


async def main(address: str, number: int) -> None:
    """Watch until standard input closes."""
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    verifiers = [Verifier(address) for _ in range(number)]
    try:
        for place in range(0, number, AT_ONCE):
            some = verifiers[place : place + AT_ONCE]
            await asyncio.gather(*(verifier.__aenter__() for verifier in some))
            await asyncio.gather(*map(watches, some))
        while await lines.readline():
            await asyncio.gather(*map(watches, verifiers))
            sys.stdout.write("watching\n")
            sys.stdout.flush()
    finally:
        await asyncio.gather(*(verifier.close() for verifier in verifiers))


if __name__ == "__main__":
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
    # Everything is closed. An interpreter that shuts down grpcio after so many streams may hang:
    # https://github.com/grpc/grpc/issues/22365
    os._exit(0)
