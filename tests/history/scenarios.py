"""Directed attempts: for each rule, the course of events that its absence makes visible.

They use the same processes, recorder and checker as a run, on a stage of two workers that hear of
nothing by notifications, so that what a rule protects stays open for a third of a lease, and one
client. One of the workers, and the client, may have a rule taken out.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import latchkey

from tests.history.checker import Findings, check
from tests.history.cluster import LOOKUP, WATCH, Client, Cluster, cluster
from tests.history.proxy import Connection, Direction, Fault
from tests.history.records import Kind, Outcome, Recorder, now, read
from tests.history.tokens import Board
from tests.support import eventually, session

__all__ = ["SCENARIOS", "Scenario", "Stage", "attempt", "staged"]

ACCOUNT = "acme"
LEASE_SECONDS = 0.8
# After a Delete, verifies go on for so long: about what a rule leaves open that is missing.
VERIFY_ON_SECONDS = 0.35
SUSPECT, OTHER = "suspect", "other"


class Stage:
    """Two hosts, one of which is suspected of lacking a rule, and a client on one of them."""

    def __init__(self, made: Cluster) -> None:
        self.cluster = made
        self.suspect = latchkey.Client(made.hosts[SUSPECT].address)
        self.other = latchkey.Client(made.hosts[OTHER].address)
        self._recorder = Recorder(made.records / "scenario")
        self._board = Board(made.tokens)
        self._numbers = itertools.count(1)

    @property
    def client(self) -> Client:
        """Return the one client."""
        return self.cluster.clients[0]

    async def create(self, *, tell: bool = False) -> "Subject":
        """Create a token, and have the client verify it if told to."""
        number = next(self._numbers)
        created = await self.other.create(ACCOUNT, f"token {number}", latchkey.Scope.READ)
        subject = Subject(number, created.token.id, created.secret.reveal())
        if tell:
            self._board.created(number, subject.secret)
        return subject

    async def verify(self, through: latchkey.Client, subject: "Subject") -> Outcome:
        """Verify through one server, once, for as long as that may take."""
        outcome = Outcome.FAILED
        began = now()
        with contextlib.suppress(latchkey.Unavailable):
            answer = await through.verify(subject.secret, timeout_seconds=4.0)
            outcome = Outcome.VALID if answer.allowed else Outcome.REFUSED
        self._recorder.add(Kind.DIRECT, outcome, subject.number, began, now())
        return outcome

    async def delete(self, through: latchkey.Client, subject: "Subject") -> None:
        """Delete until that is confirmed."""
        began = now()
        await through.delete(ACCOUNT, subject.token_id, timeout_seconds=10.0)
        self._recorder.add(Kind.DELETE, Outcome.CONFIRMED, subject.number, began, now())
        self._board.deleted(subject.number)

    async def verify_on(self, through: latchkey.Client, subject: "Subject") -> None:
        """Verify again and again for a while."""
        loop = asyncio.get_running_loop()
        end = loop.time() + VERIFY_ON_SECONDS
        while loop.time() < end:
            await self.verify(through, subject)
            await asyncio.sleep(0.005)

    async def remembered(self, through: latchkey.Client, subject: "Subject") -> None:
        """Have a server remember the token."""

        async def twice() -> bool:
            return {await self.verify(through, subject) for _ in range(2)} == {Outcome.VALID}

        await eventually(twice, "the server verifies")

    async def remembered_by_client(self, subject: "Subject") -> None:
        """Wait until the client answers from memory."""
        await eventually(lambda: self._seen(subject, Kind.NOWAIT), "the client answers from memory")

    async def rows(self) -> int:
        """Return how many verifiers the database knows."""
        async with session(self.cluster.database_url) as connection:
            count: int = await connection.fetchval("SELECT count(*) FROM verifier")
        return count

    def findings(self) -> Findings:
        """Judge what was seen so far."""
        self._recorder.flush()
        return check(self.cluster.histories())

    async def close(self) -> None:
        self._recorder.close()
        self._board.close()
        await self.suspect.close()
        await self.other.close()

    def _seen(self, subject: "Subject", kind: Kind) -> bool:
        file = self.cluster.records / f"{self.client.name}.{len(self.client.children) - 1}"
        return file.exists() and any(
            record.token == subject.number
            and record.kind == kind
            and record.outcome == Outcome.VALID
            for record in read(file)
        )


@dataclass(frozen=True)
class Subject:
    """The token that a scenario is about."""

    number: int
    token_id: str
    secret: str


async def answer_of_look_up_comes_late(stage: Stage) -> None:
    """A look-up is read before a Delete and answered after it, and the server asked again (4)."""
    await stage.remembered(stage.suspect, await stage.create())
    subject = await stage.create()
    late = Fault(_database(LOOKUP), "hold", Direction.DOWN)
    async with asyncio.TaskGroup() as group, stage.cluster.database.fault(late):
        group.create_task(stage.verify(stage.suspect, subject))
        await eventually(lambda: late.befallen, "the look-up is answered")
        await stage.delete(stage.other, subject)
    await stage.verify_on(stage.suspect, subject)


async def answer_of_verify_comes_late(stage: Stage) -> None:
    """A client's verify is answered before a Delete, and it hears of that after it (4)."""
    await stage.remembered_by_client(await stage.create(tell=True))
    late = Fault(lambda c: c.label != WATCH, "hold", Direction.DOWN)
    async with stage.cluster.network.fault(late):
        subject = await stage.create(tell=True)
        await eventually(lambda: late.befallen, "the verify is answered")
        await stage.delete(stage.other, subject)
    await asyncio.sleep(VERIFY_ON_SECONDS)


async def worker_is_frozen(stage: Stage) -> None:
    """A server stands still until a Delete has waited its lease out, and is asked then (5)."""
    subject = await stage.create()
    await stage.remembered(stage.suspect, subject)
    (process,) = stage.cluster.hosts[SUSPECT].worker_processes()
    async with asyncio.TaskGroup() as group:
        process.suspend()
        try:
            await stage.delete(stage.other, subject)
            for _ in range(3):
                group.create_task(stage.verify(stage.suspect, subject))
            # So that they are waiting for it when it goes on.
            await asyncio.sleep(0.05)
        finally:
            process.resume()


async def client_is_frozen(stage: Stage) -> None:
    """A client stands still until a Delete has waited its lease out (5)."""
    subject = await stage.create(tell=True)
    await stage.remembered_by_client(subject)
    process = stage.client.child.handle
    process.suspend()
    try:
        await stage.delete(stage.other, subject)
    finally:
        process.resume()
    await asyncio.sleep(VERIFY_ON_SECONDS)


async def client_hears_nothing(stage: Stage) -> None:
    """Nothing of a Delete gets through to a client that answers on under its lease (7, 8)."""
    subject = await stage.create(tell=True)
    await stage.remembered_by_client(subject)
    silent = Fault(lambda c: c.label == WATCH, "swallow", Direction.DOWN)
    async with stage.cluster.network.fault(silent):
        await stage.delete(stage.suspect, subject)
        await asyncio.sleep(VERIFY_ON_SECONDS)


async def row_is_removed(stage: Stage) -> None:
    """A server stands still until its row is removed, goes on, and learns of a Delete late (3)."""
    (process,) = stage.cluster.hosts[SUSPECT].worker_processes()
    process.suspend()
    try:

        async def alone() -> bool:
            return await stage.rows() == 1

        await eventually(alone, "the row of the frozen worker is removed")
    finally:
        process.resume()
    await another_deletes(stage)


async def another_deletes(stage: Stage) -> None:
    """What one server remembers is deleted through the other (3)."""
    subject = await stage.create()
    await stage.remembered(stage.suspect, subject)
    await stage.delete(stage.other, subject)
    await stage.verify_on(stage.suspect, subject)


async def suspect_deletes(stage: Stage) -> None:
    """What one server remembers is deleted through the one that may bury the living (9)."""
    subject = await stage.create()
    await stage.remembered(stage.other, subject)
    await stage.delete(stage.suspect, subject)
    await stage.verify_on(stage.other, subject)


Scenario = Callable[[Stage], Awaitable[None]]

# By the rule that each makes visible, and of whom: a late accept of the other may have its cause
# in the first one.
SCENARIOS: dict[str, tuple[Scenario, ...]] = {
    "3": (row_is_removed,),
    "3-log": (another_deletes,),
    "4": (answer_of_look_up_comes_late, answer_of_verify_comes_late),
    "5": (worker_is_frozen, client_is_frozen),
    "7": (client_hears_nothing,),
    "8": (client_hears_nothing,),
    "9": (suspect_deletes,),
}
# Where the client hangs: on the suspect if it is that which treats it badly, else on the one that
# keeps the rules, so that what it does wrong is its own. The other scenarios have no client.
_CLIENT_ON = {None: OTHER, "4": OTHER, "5": OTHER, "7": SUSPECT, "8": SUSPECT}


@contextlib.asynccontextmanager
async def staged(
    folder: Path, database_url: str, rule_to_break: str | None
) -> AsyncIterator[Stage]:
    """Yield a stage on a database. Its client, and one of its hosts, lack the rule."""
    async with cluster(
        folder,
        database_url,
        lease_seconds=LEASE_SECONDS,
        seed=1,
        settings={"notify": "off"},
    ) as made:
        await asyncio.gather(
            made.add_host(SUSPECT, rule_to_break=rule_to_break), made.add_host(OTHER)
        )
        if (host := _CLIENT_ON.get(rule_to_break)) is not None:
            await made.add_client([host], rule_to_break=rule_to_break)
        stage = Stage(made)
        try:
            yield stage
        finally:
            await stage.close()


async def attempt(stage: Stage, scenario: Scenario) -> Findings:
    """Play a scenario once, and return what was found so far.

    What the course of events did not allow this time, on a machine that is too busy, proves
    nothing either way: it is not a failure.
    """
    with contextlib.suppress(latchkey.Unavailable, TimeoutError):
        await scenario(stage)
    return stage.findings()


def _database(label: str) -> Callable[[Connection], bool]:
    return lambda connection: connection.label == label and connection.tag == SUSPECT
