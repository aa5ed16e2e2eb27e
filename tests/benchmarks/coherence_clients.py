"""Clients that watch: the library's verifiers, many to a process. A script: address and number.

Told a line, it answers when all of them watch. Told nothing any more, it closes them and ends.
"""

import asyncio
import contextlib
import os
import resource
import sys

from latchkey import Verifier

from tests.benchmarks.coherence_memory import watches

# So that none waits so long for its first grant that it takes the server for dead.
AT_ONCE = 25


async def main(address: str, number: int) -> None:
    """Watch until told nothing any more."""
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
    # All is closed. An interpreter that takes down grpcio after so many streams may hang:
    # https://github.com/grpc/grpc/issues/22365
    os._exit(0)
