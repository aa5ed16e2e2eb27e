"""`python -m tests.soak.client`: a service that verifies with the client library, for a while.

It ends in order when its standard input does, or is killed. What it is told by the board holds for
its own memory as well: a token whose Delete has been confirmed is refused from then on.
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

from tests.board import Reader
from tests.children import end_with_parent

PAUSE_SECONDS = 0.1
# Of a verify: what is looked for is growth, and a busy machine is no fault.
TIMEOUT_SECONDS = 10.0
# Of those that live on, how many are verified in a turn; of others, how many are kept in mind.
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
            # So that they are remembered. Whether they have been deleted by now, nobody can say.
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
            _complain(f"wrong: {answer.verdict.name} for a token to be {word}")


def _complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - read by the run


if __name__ == "__main__":
    end_with_parent()
    given = json.loads(sys.argv[1])
    asyncio.run(_run(given, Path(given["live"]).read_text().split()))
