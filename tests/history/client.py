"""`python -m tests.history.client`: a process that verifies continuously, as services do.

It uses each of its verifiers in two ways at the same time. A thread calls `verify_nowait`, as a
threaded service might, so that invalidations can arrive at any point. The event loop calls `verify`
if that had no answer, and occasionally if it had one. The process ends when its standard input
closes.
"""

import asyncio
import contextlib
import json
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import latchkey

from tests.helpers.child_processes import end_with_parent
from tests.helpers.token_feed import Reader
from tests.history.broken import break_rule, rule_to_break
from tests.history.narrowing import QUESTION, SCOPE
from tests.history.processes import tell_if_strange
from tests.history.records import Kind, Outcome, Recorder, now

# Pause between two passes over the tokens. Twenty processes share a few cores with the system under
# test.
NOWAIT_PAUSE_SECONDS = 0.02
VERIFY_PAUSE_SECONDS = 0.02
# Tokens per pass of the thread.
NOWAIT_TOKENS = 12
# How long a token is verified after the confirmation of its Delete: a few leases. The second value
# is the maximum if the confirmation never arrives.
LINGER_SECONDS = 2.5
TOKEN_SECONDS_MAX = 20.0
# Concurrent verifies of one verifier, and the pauses between two verifies of one token. The pauses
# are short at first and right after the Delete. Without the cache each verify is a call.
UNDER_WAY_MAX = 32
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.03, 0.5
# How often `verify` is called although `verify_nowait` would have answered.
VERIFY_ANYWAY_SHARE = 0.02


class _Token:
    """A token that is verified until `until`, next with `verify` at `ask_at`."""

    def __init__(self, number: int, secret: str) -> None:
        self.number = number
        self.secret = secret
        self.until = time.monotonic() + TOKEN_SECONDS_MAX
        self.pause = PAUSE_SECONDS_MIN
        self.ask_at = 0.0
        self.under_way = False

    def hurry(self) -> None:
        self.ask_at, self.pause = 0.0, PAUSE_SECONDS_MIN


class _Asker:
    """One verifier and the tokens that it verifies."""

    def __init__(self, number: int, target: str, recorder: Recorder, seed: int) -> None:
        self.tokens: dict[int, _Token] = {}
        self._number = number
        # `native` does not accept gRPC's notation for a list of addresses as an authority.
        options = (("grpc.default_authority", "latchkey"),)
        self._client = latchkey.Client(target, options=options)
        self.verifier = latchkey.Verifier(self._client)
        self._recorder = recorder
        self._random = random.Random(seed)  # noqa: S311 - repeatable
        self._under_way: set[asyncio.Task[None]] = set()

    def hammer(self) -> None:
        """Call `verify_nowait` for some of the tokens. Runs in a separate thread."""
        # Copied in one step, because the event loop may change it.
        tokens = list(self.tokens.values())
        if len(tokens) > NOWAIT_TOKENS:
            tokens = self._random.sample(tokens, NOWAIT_TOKENS)
        for token in tokens:
            self._recall(token)

    def take_in(self, number: int, secret: str | None) -> None:
        """Start to verify a new token, or stop soon to verify a deleted one."""
        if secret is not None:
            self.tokens[number] = _Token(number, secret)
        elif (token := self.tokens.get(number)) is not None:
            token.until = min(token.until, time.monotonic() + LINGER_SECONDS)
            token.hurry()

    def ask(self) -> None:
        """Start `verify` for the tokens that are due."""
        moment = time.monotonic()
        for token in tuple(self.tokens.values()):
            if moment >= token.until:
                del self.tokens[token.number]
            elif moment >= token.ask_at and not token.under_way:
                if len(self._under_way) >= UNDER_WAY_MAX:
                    return
                if self._recall(token) and self._random.random() >= VERIFY_ANYWAY_SHARE:
                    token.ask_at = moment + PAUSE_SECONDS_MIN
                    continue
                token.ask_at = moment + token.pause
                token.pause = min(token.pause * 1.5, PAUSE_SECONDS_MAX)
                token.under_way = True
                task = asyncio.create_task(self._verify(token))
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)

    def tell_counts(self) -> None:
        stats = self.verifier.stats()
        self._recorder.add(Kind.COUNTS, Outcome.DONE, self._number, stats.hits, stats.misses)

    async def close(self) -> None:
        for task in tuple(self._under_way):
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        await self.verifier.close()
        await self._client.close()

    def _recall(self, token: _Token) -> bool:
        """Call `verify_nowait`, and return whether it had an answer."""
        began = now()
        answer = self.verifier.verify_nowait(token.secret, SCOPE, **QUESTION)
        ended = now()
        if answer is None:
            return False
        self._recorder.add(Kind.NOWAIT, _outcome(answer), token.number, began, ended)
        return True

    async def _verify(self, token: _Token) -> None:
        began = now()
        outcome = Outcome.FAILED
        try:
            outcome = _outcome(await self.verifier.verify(token.secret, SCOPE, **QUESTION))
        except latchkey.LatchkeyError as error:
            tell_if_strange(error)  # "No safe answer" is an expected outcome.
        finally:
            token.under_way = False
        self._recorder.add(Kind.VERIFY, outcome, token.number, began, now())


def _outcome(answer: latchkey.Verification) -> Outcome:
    return Outcome.VALID if answer.verdict is latchkey.Verdict.VALID else Outcome.REFUSED


async def _run(options: dict[str, Any]) -> None:
    recorder = Recorder(Path(options["records"]))
    reader = Reader(Path(options["tokens"]))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin, stop.set)
    askers = [
        _Asker(number, options["target"], recorder, options["seed"] + number)
        for number in range(options["verifiers"])
    ]
    stopped = threading.Event()

    def hammer() -> None:
        while not stopped.is_set():
            for asker in askers:
                asker.hammer()
            time.sleep(NOWAIT_PAUSE_SECONDS)

    thread = threading.Thread(target=hammer, name="hammer", daemon=True)
    async with contextlib.AsyncExitStack() as stack:
        for asker in askers:
            stack.push_async_callback(asker.close)
            await stack.enter_async_context(asker.verifier)
        thread.start()
        try:
            while not stop.is_set():
                for notice in reader.read():
                    for asker in askers:
                        asker.take_in(*notice)
                for asker in askers:
                    asker.ask()
                    asker.tell_counts()
                recorder.flush()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(VERIFY_PAUSE_SECONDS):
                        await stop.wait()
        finally:
            # Before the verifiers close, because their last messages do not matter.
            stopped.set()
            await asyncio.to_thread(thread.join)
    recorder.close()


if __name__ == "__main__":
    end_with_parent()
    break_rule(rule_to_break())
    asyncio.run(_run(json.loads(sys.argv[1])))
