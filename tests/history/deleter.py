"""`python -m tests.history.deleter`: creates and imports tokens, announces them to the clients,
ends them with a Delete or another change, and verifies them again.

It talks to the servers directly. Each deleter handles one token after another. The process ends
when its standard input closes, after its last Deletes are confirmed.
"""

import asyncio
import itertools
import json
import random
import sys
from pathlib import Path
from typing import Any

import latchkey

from tests.helpers.child_processes import end_with_parent
from tests.helpers.token_feed import Board
from tests.history import narrowing
from tests.history.narrowing import Subject
from tests.history.processes import tell_if_strange
from tests.history.records import ENDS, Kind, Outcome, Recorder, now

# The lifetime of a token ranges from zero, so that look-ups of it overlap its Delete, to long
# enough for every client to cache it.
LIFE_SECONDS_MAX = 0.8
# After this time, the run is over, and an unconfirmed Delete does not count.
CONFIRM_SECONDS_MAX = 30.0
RETRY_SECONDS = 0.1
# Verifies on a stopped server wait until it continues, because their answer matters.
DIRECT_TIMEOUT_SECONDS = 4.0
DIRECT_UNDER_WAY_MAX = 200
FLUSH_SECONDS = 0.05
# How often a token is imported instead of created.
IMPORT_SHARE = 0.25
# How often a token is deleted, and not ended by another change.
DELETE_SHARE = 0.4
# How often two deleters end the same token at once, and how often one first uses `no_wait`.
TWICE_SHARE = 0.1
NO_WAIT_SHARE = 0.1
# How often a token is looked up on each server while it is deleted.
OVERLAP_SHARE = 0.3
# How often a token is read before it is deleted, as in a response to a leak, to check that it
# exists.
GET_SHARE = 0.3
# Sorted, because the choice is repeatable.
OTHERS = sorted(ENDS - {Kind.DELETE})
# Not twice: a second expiry is later, and a second DeleteAll does not find the token, as if it had
# been lost.
ONCE = {Kind.EXPIRE, Kind.DELETE_ALL}


class Deleters:
    """The state that all deleters share. `addresses` has one item for each connection to keep."""

    def __init__(self, addresses: list[str], recorder: Recorder, board: Board, seed: int) -> None:
        self._clients = [latchkey.Client(address) for address in addresses]
        self._recorder = recorder
        self._board = board
        self._random = random.Random(seed)  # noqa: S311 - repeatable
        self._numbers = itertools.count(1)
        self._direct: set[asyncio.Task[None]] = set()
        self.stop = asyncio.Event()

    async def run(self, deleters: int) -> None:
        async with asyncio.TaskGroup() as group:
            flusher = group.create_task(self._keep_flushing())
            async with asyncio.TaskGroup() as working:
                for number in range(deleters):
                    working.create_task(self._delete_on(f"deleter-{number}"))
            await asyncio.gather(*self._direct)
            flusher.cancel()
        await asyncio.gather(*(client.close() for client in self._clients))

    async def _delete_on(self, account: str) -> None:
        chance = self._random.random
        while not self.stop.is_set():
            number = next(self._numbers)
            created = await self._create(account, number)
            if created is None:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            self._board.created(number, created.secret)
            await asyncio.sleep(LIFE_SECONDS_MAX * chance() ** 2)
            if chance() < GET_SHARE:
                await self._get(account, created.id, number)
            if chance() < OVERLAP_SHARE:
                self._ask_everyone(number, created.secret)
                # Lets the call be in transit, arrive, or wait for its look-up.
                await asyncio.sleep(0.02 * chance())
            kind = Kind.DELETE if chance() < DELETE_SHARE else self._random.choice(OTHERS)
            no_wait = chance() < NO_WAIT_SHARE and kind not in ONCE
            if no_wait:
                await self._end(kind, created, number, no_wait=True)
            ends = [self._until_confirmed(kind, created, number, again=no_wait)]
            if chance() < TWICE_SHARE and kind not in ONCE:
                ends.append(self._until_confirmed(kind, created, number, again=True))
            await asyncio.gather(*ends)

    async def _create(self, account: str, number: int) -> Subject | None:
        kind = Kind.IMPORT if self._random.random() < IMPORT_SHARE else Kind.CREATE
        name = f"token {number}"
        began = now()
        try:
            if kind is Kind.IMPORT:
                subject = await narrowing.import_(self._any_client(), account, name)
            else:
                created = await narrowing.create(self._any_client(), account, name)
                subject = Subject(account, created.token.id, created.secret.reveal())
        except latchkey.LatchkeyError as error:
            tell_if_strange(error)
            self._recorder.add(kind, Outcome.FAILED, number, began, now())
            return None
        self._recorder.add(kind, Outcome.DONE, number, began, now())
        return subject

    async def _until_confirmed(
        self, kind: Kind, subject: Subject, number: int, *, again: bool
    ) -> None:
        """End a token, repeating the call until it is confirmed, and verify it on every connection
        right after."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + CONFIRM_SECONDS_MAX
        while not await self._end(kind, subject, number, again=again):
            if loop.time() > give_up:
                return
            again = True
            if kind is Kind.EXPIRE:
                kind = Kind.DELETE
            await asyncio.sleep(RETRY_SECONDS)
        self._ask_everyone(number, subject.secret)
        self._board.deleted(number)

    async def _end(
        self,
        kind: Kind,
        subject: Subject,
        number: int,
        *,
        again: bool = False,
        no_wait: bool = False,
    ) -> bool:
        outcome = Outcome.FAILED
        began = now()
        try:
            end = await narrowing.end(
                kind, self._any_client(), subject, again=again, no_wait=no_wait
            )
        except latchkey.LatchkeyError as error:
            tell_if_strange(error)
            ended = now()
        else:
            ended = now()
            if not end.found:
                # The checker decides whether that is a loss. A retry would not change it.
                outcome = Outcome.NOT_FOUND
            else:
                outcome = Outcome.CONFIRMED if end.confirmed else Outcome.COMMITTED
            if outcome is Outcome.COMMITTED and not no_wait:
                raise AssertionError("a change that waits answered without an effective_time")
        self._recorder.add(kind, outcome, number, began, ended)
        return outcome in (Outcome.CONFIRMED, Outcome.NOT_FOUND)

    async def _get(self, account: str, token_id: str, number: int) -> None:
        outcome = Outcome.FAILED
        began = now()
        try:
            await self._any_client().get(account, token_id)
            outcome = Outcome.DONE
        except latchkey.NotFound:
            outcome = Outcome.NOT_FOUND
        except latchkey.LatchkeyError as error:
            tell_if_strange(error)
        self._recorder.add(Kind.GET, outcome, number, began, now())

    def _ask_everyone(self, number: int, secret: str) -> None:
        """Verify over each connection, without waiting for the answers."""
        for client in self._clients:
            if len(self._direct) < DIRECT_UNDER_WAY_MAX:
                task = asyncio.create_task(self._verify(client, number, secret))
                self._direct.add(task)
                task.add_done_callback(self._direct.discard)

    async def _verify(self, client: latchkey.Client, number: int, secret: str) -> None:
        outcome = Outcome.FAILED
        began = now()
        try:
            answer = await narrowing.verify(client, secret, DIRECT_TIMEOUT_SECONDS)
            outcome = Outcome.VALID if answer.allowed else Outcome.REFUSED
        except latchkey.LatchkeyError as error:
            tell_if_strange(error)  # "No safe answer" is an expected outcome.
        self._recorder.add(Kind.DIRECT, outcome, number, began, now())

    def _any_client(self) -> latchkey.Client:
        return self._random.choice(self._clients)

    async def _keep_flushing(self) -> None:
        while True:
            self._recorder.flush()
            await asyncio.sleep(FLUSH_SECONDS)


async def _run(options: dict[str, Any]) -> None:
    recorder, board = Recorder(Path(options["records"])), Board(Path(options["tokens"]))
    deleters = Deleters(options["addresses"], recorder, board, options["seed"])
    asyncio.get_running_loop().add_reader(sys.stdin, deleters.stop.set)
    await deleters.run(options["deleters"])
    recorder.close()
    board.close()


if __name__ == "__main__":
    end_with_parent()
    asyncio.run(_run(json.loads(sys.argv[1])))
