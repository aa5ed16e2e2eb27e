"""Directed scenarios: for each rule, the sequence of events that exposes its absence.

They use the same processes, recorder and checker as a run. The stage has one client and two
workers. Notifications are off, so that each gap stays open for a third of a lease. One of the
workers and the client may lack a rule.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import latchkey

from tests.helpers.databases import session
from tests.helpers.token_feed import Board
from tests.helpers.waiting import eventually
from tests.history import narrowing
from tests.history.checker import Findings, check
from tests.history.cluster import LOOKUP, WATCH, Client, Cluster, cluster
from tests.history.proxy import Connection, Direction, Fault
from tests.history.records import Kind, Outcome, Record, Recorder, now, read

__all__ = [
    "OTHER",
    "SCENARIOS",
    "SUSPECT",
    "WAIT_SECONDS",
    "Scenario",
    "Stage",
    "Subject",
    "play",
    "staged",
]

ACCOUNT = "acme"
LEASE_SECONDS = 0.8
# After a Delete, verifies continue for at least this long, the time for which a missing rule leaves
# a gap open.
VERIFY_ON_SECONDS = 0.35
# Far longer than any step here takes on a busy machine.
WAIT_SECONDS = 60.0
# A scenario was cut short because an answer did not come in time.
ATTEMPTS_MAX = 5
SUSPECT, OTHER = "suspect", "other"


class Stage:
    """Two hosts, one of which (the suspect) may lack a rule, and a client on one of them."""

    def __init__(self, made: Cluster) -> None:
        self.cluster = made
        self.suspect = latchkey.Client(made.hosts[SUSPECT].address)
        self.other = latchkey.Client(made.hosts[OTHER].address)
        self._recorder = Recorder(made.records / "scenario")
        self._board = Board(made.tokens)
        self._numbers = itertools.count(1)
        self._deleted: dict[int, int] = {}

    @property
    def client(self) -> Client:
        """Return the one client."""
        return self.cluster.clients[0]

    async def create(self, *, tell: bool = False, account: str = "") -> "Subject":
        """Create a token, and have the client verify it if requested."""
        number = next(self._numbers)
        began = now()
        created = await narrowing.create(self.other, account or ACCOUNT, f"token {number}")
        self._recorder.add(Kind.CREATE, Outcome.DONE, number, began, now())
        subject = Subject(number, created.token.id, created.secret.reveal())
        if tell:
            self._board.created(number, subject.secret)
        return subject

    async def verify(self, through: latchkey.Client, subject: "Subject") -> Outcome:
        """Verify through one server, once, without a time limit."""
        outcome = Outcome.FAILED
        began = now()
        with contextlib.suppress(latchkey.Unavailable, latchkey.ResourceExhausted):
            answer = await narrowing.verify(through, subject.secret, 4.0)
            outcome = Outcome.VALID if answer.allowed else Outcome.REFUSED
        self._recorder.add(Kind.DIRECT, outcome, subject.number, began, now())
        return outcome

    async def delete(self, through: latchkey.Client, subject: "Subject") -> None:
        """Delete, and repeat that until it is confirmed, or until the service reports that the
        token does not exist.
        """
        outcome = Outcome.CONFIRMED
        began = now()
        try:
            await through.delete(ACCOUNT, subject.token_id, timeout_seconds=10.0)
        except latchkey.NotFound:
            outcome = Outcome.NOT_FOUND
        ended = self._deleted[subject.number] = now()
        self._recorder.add(Kind.DELETE, outcome, subject.number, began, ended)
        self._board.deleted(subject.number)

    async def end(
        self, kind: Kind, through: latchkey.Client, subject: "Subject", account: str = ""
    ) -> None:
        """End a token with a change of this kind, once."""
        named = narrowing.Subject(account or ACCOUNT, subject.token_id, subject.secret)
        began = now()
        end = await narrowing.end(kind, through, named, again=True, timeout_seconds=10.0)
        assert end.confirmed, kind.name
        ended = self._deleted[subject.number] = now()
        self._recorder.add(kind, Outcome.CONFIRMED, subject.number, began, ended)
        self._board.deleted(subject.number)

    async def verify_on(self, through: latchkey.Client, subject: "Subject") -> None:
        """Verify repeatedly for a while, and until one verify is answered."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        answered = False
        while not answered or loop.time() < began + VERIFY_ON_SECONDS:
            assert loop.time() < began + WAIT_SECONDS, "no verify is answered"
            answered |= await self.verify(through, subject) is not Outcome.FAILED
            await asyncio.sleep(0.005)

    async def verify_for(
        self, through: latchkey.Client, subject: "Subject", seconds: float
    ) -> None:
        """Verify repeatedly for a while, whether a verify is answered or not."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while loop.time() < until:
            await self.verify(through, subject)
            await asyncio.sleep(0.005)

    async def client_verifies_on(self, subject: "Subject") -> None:
        """Wait for a while, and until the client has an answer about a deleted token."""
        await asyncio.sleep(VERIFY_ON_SECONDS)
        deleted = self._deleted[subject.number]

        def answered(record: Record) -> bool:
            return record.outcome in (Outcome.VALID, Outcome.REFUSED) and record.began > deleted

        await self._until_client(subject, answered, "the client is answered")

    async def remembered(self, through: latchkey.Client, subject: "Subject") -> None:
        """Make a server cache the token."""

        async def twice() -> bool:
            return {await self.verify(through, subject) for _ in range(2)} == {Outcome.VALID}

        await eventually(twice, "the server verifies", WAIT_SECONDS)

    async def remembered_by_client(self, subject: "Subject") -> None:
        """Wait until the client answers from its cache."""

        def recalled(record: Record) -> bool:
            return record.kind == Kind.NOWAIT and record.outcome == Outcome.VALID

        await self._until_client(subject, recalled, "the client answers from its cache")

    async def rows(self) -> int:
        """Return how many verifiers the database has registered."""
        async with session(self.cluster.database_url) as connection:
            count: int = await connection.fetchval("SELECT count(*) FROM verifier")
        return count

    def findings(self) -> Findings:
        """Check the histories so far."""
        self._recorder.flush()
        return check(self.cluster.histories())

    async def close(self) -> None:
        self._recorder.close()
        self._board.close()
        await self.suspect.close()
        await self.other.close()

    async def _until_client(
        self, subject: "Subject", check: Callable[[Record], bool], what: str
    ) -> None:
        """Wait until the client has recorded a call about `subject` that passes a check."""
        file = self.cluster.records / self.client.child.name

        def seen() -> bool:
            return file.exists() and any(
                record.token == subject.number and check(record) for record in read(file)
            )

        await eventually(seen, what, WAIT_SECONDS)


@dataclass(frozen=True)
class Subject:
    """The token that a scenario is about."""

    number: int
    token_id: str
    secret: str


async def answer_of_look_up_comes_late(stage: Stage) -> None:
    """A look-up reads before a Delete and returns after it; then the server is called again (4)."""
    await stage.remembered(stage.suspect, await stage.create())
    subject = await stage.create()
    late = Fault(_database(LOOKUP), "hold", Direction.DOWN)
    async with asyncio.TaskGroup() as group, stage.cluster.database.fault(late):
        group.create_task(stage.verify(stage.suspect, subject))
        await eventually(lambda: late.befallen, "the look-up is answered", WAIT_SECONDS)
        await stage.delete(stage.other, subject)
    await stage.verify_on(stage.suspect, subject)


async def answer_of_verify_comes_late(stage: Stage) -> None:
    """A client's verify is answered before a Delete, and the client receives the answer after it
    (4)."""
    await stage.remembered_by_client(await stage.create(tell=True))
    late = Fault(lambda c: c.label != WATCH, "hold", Direction.DOWN)
    async with stage.cluster.network.fault(late):
        subject = await stage.create(tell=True)
        await eventually(lambda: late.befallen, "the verify is answered", WAIT_SECONDS)
        await stage.delete(stage.other, subject)
    await stage.client_verifies_on(subject)


async def worker_is_frozen(stage: Stage) -> None:
    """A server is frozen until a Delete has waited for the end of its lease, and is then called
    (5).
    """
    subject = await stage.create()
    await stage.remembered(stage.suspect, subject)
    (process,) = stage.cluster.hosts[SUSPECT].worker_processes()
    async with asyncio.TaskGroup() as group:
        process.suspend()
        try:
            await stage.delete(stage.other, subject)
            for _ in range(3):
                group.create_task(stage.verify(stage.suspect, subject))
            # Sent now, so that they are waiting when the server continues.
            await asyncio.sleep(0.05)
        finally:
            process.resume()
    await stage.verify_on(stage.suspect, subject)


async def client_is_frozen(stage: Stage) -> None:
    """A client is frozen until a Delete has waited for the end of its lease (5)."""
    subject = await stage.create(tell=True)
    await stage.remembered_by_client(subject)
    process = stage.client.child.handle
    process.suspend()
    try:
        await stage.delete(stage.other, subject)
    finally:
        process.resume()
    await stage.client_verifies_on(subject)


async def client_hears_nothing(stage: Stage) -> None:
    """No message about a Delete reaches a client that keeps answering under its lease (7, 8)."""
    subject = await stage.create(tell=True)
    await stage.remembered_by_client(subject)
    silent = Fault(lambda c: c.label == WATCH, "swallow", Direction.DOWN)
    async with stage.cluster.network.fault(silent):
        await stage.delete(stage.suspect, subject)
        await stage.client_verifies_on(subject)


async def client_hears_of_no_change(stage: Stage) -> None:
    """No message reaches a client that keeps answering under its lease, while each other kind of
    change ends a token (8)."""
    kinds = sorted(narrowing.CHANGES.keys() - {Kind.DELETE})
    # An account each, because DeleteAll ends all tokens of one.
    subjects = {
        kind: await stage.create(tell=True, account=kind.name.lower().replace("_", "-"))
        for kind in kinds
    }
    for subject in subjects.values():
        await stage.remembered_by_client(subject)
    silent = Fault(lambda c: c.label == WATCH, "swallow", Direction.DOWN)
    async with stage.cluster.network.fault(silent):
        async with asyncio.TaskGroup() as group:
            for kind, subject in subjects.items():
                account = kind.name.lower().replace("_", "-")
                group.create_task(stage.end(kind, stage.suspect, subject, account))
        for subject in subjects.values():
            await stage.client_verifies_on(subject)


async def row_is_removed(stage: Stage) -> None:
    """A server is frozen until its row is removed, continues, and reads a Delete late (3)."""
    (process,) = stage.cluster.hosts[SUSPECT].worker_processes()
    process.suspend()
    try:

        async def alone() -> bool:
            return await stage.rows() == 1

        await eventually(alone, "the row of the frozen worker is removed", WAIT_SECONDS)
    finally:
        process.resume()
    await another_deletes(stage)


async def another_deletes(stage: Stage) -> None:
    """A token that one server has cached is deleted through the other (3)."""
    subject = await stage.create()
    await stage.remembered(stage.suspect, subject)
    await stage.delete(stage.other, subject)
    await stage.verify_on(stage.suspect, subject)


async def suspect_deletes(stage: Stage) -> None:
    """A token that one server has cached is deleted through the suspect, which may remove live rows
    (9)."""
    subject = await stage.create()
    await stage.remembered(stage.other, subject)
    await stage.delete(stage.suspect, subject)
    await stage.verify_on(stage.other, subject)


Scenario = Callable[[Stage], Awaitable[None]]

# By exposed rule, and by suspect: the suspect may cause a late accept of the other host.
SCENARIOS: dict[str, tuple[Scenario, ...]] = {
    "3": (row_is_removed,),
    "3-log": (another_deletes,),
    "4": (answer_of_look_up_comes_late, answer_of_verify_comes_late),
    "5": (worker_is_frozen, client_is_frozen),
    "7": (client_hears_nothing,),
    "8": (client_hears_nothing,),
    "8-changes": (client_hears_of_no_change,),
    "9": (suspect_deletes,),
}
# The host to which the client is connected: the suspect, if the rule concerns a server's clients;
# otherwise the correct host, so that every error is the client's own. The other scenarios have no
# client.
_CLIENT_ON = {None: OTHER, "4": OTHER, "5": OTHER, "7": SUSPECT, "8": SUSPECT, "8-changes": SUSPECT}


@contextlib.asynccontextmanager
async def staged(
    folder: Path, database_url: str, rule_to_break: str | None
) -> AsyncIterator[Stage]:
    """Yield a stage on a database. Its client and one of its hosts lack the rule."""
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


async def play(stage: Stage, scenario: Scenario) -> Findings:
    """Play a scenario once, to its end, and return all findings so far.

    If a busy machine does not answer in time, the scenario is cut short, proves nothing, and is
    played again. Raises Unavailable if that happens every time.
    """
    for _ in range(ATTEMPTS_MAX - 1):
        with contextlib.suppress(latchkey.Unavailable, latchkey.ResourceExhausted):
            await _played(stage, scenario)
            return stage.findings()
    await _played(stage, scenario)
    return stage.findings()


async def _played(stage: Stage, scenario: Scenario) -> None:
    try:
        await scenario(stage)
    except* latchkey.Unavailable as group:
        # It may have been raised in a task of the scenario.
        raise latchkey.Unavailable("The scenario was cut short.") from group


def _database(label: str) -> Callable[[Connection], bool]:
    return lambda connection: connection.label == label and connection.tag == SUSPECT
