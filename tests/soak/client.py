"""`python -m tests.soak.client`: a service that verifies with the client library for a while.

It shuts down when its standard input closes, unless it is killed first. The notices on the board
also apply to its own cache: it must reject a token whose Delete has been confirmed.
"""

import asyncio
import contextlib
import json
import random
import sys
from collections import deque
from pathlib import Path
from typing import Any

import latchkey

from tests.helpers.child_processes import end_with_parent
from tests.helpers.token_feed import Reader

PAUSE_SECONDS = 0.1
# Time-out of a verify. It is long, because the soak looks for growth, and a busy machine is not a
# fault.
TIMEOUT_SECONDS = 10.0
# How many permanent tokens are verified per round, and how many of the others are kept.
LIVE_EACH = 5
KNOWN_MAX = 20


async def _run(options: dict[str, Any], live: list[str]) -> None:
    board = Reader(Path(options["board"]))
    stop = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, stop.set)
    going: dict[int, str] = {}
    gone: deque[str] = deque(maxlen=KNOWN_MAX)
    async with (
        latchkey.Client(options["target"]) as client,
        latchkey.Verifier(client, timeout_seconds=TIMEOUT_SECONDS) as verifier,
    ):
        while not stop.is_set():
            for number, secret in board.read():
                if secret is not None:
                    going[number] = secret
                elif number in going:
                    gone.append(going.pop(number))
            await _verify(verifier, random.sample(live, LIVE_EACH), "VALID", True)
            # Verified now, so that they are cached. They may have been deleted by now.
            await _verify(verifier, list(going.values())[-KNOWN_MAX:], "either", None)
            await _verify(verifier, list(gone), "refused", False)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PAUSE_SECONDS):
                    await stop.wait()


async def _verify(
    verifier: latchkey.Verifier, secrets: list[str], word: str, expected: bool | None
) -> None:
    for secret in secrets:
        try:
            answer = await verifier.verify(secret, latchkey.Scope.READ)
        except latchkey.LatchkeyError as error:
            _complain(f"unexpected: {type(error).__name__}: {error}")
            continue
        if expected is not None and answer.allowed is not expected:
            _complain(f"wrong: {answer.verdict.name} for a token that must be {word}")


def _complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - read by the run


if __name__ == "__main__":
    end_with_parent()
    given = json.loads(sys.argv[1])
    asyncio.run(_run(given, Path(given["live"]).read_text().split()))
