"""How the primary is tracked: its log lines, its warnings in `status`, and diagnoses."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest
from latchkey_service.coherence import primary as primary_module
from latchkey_service.coherence.primary import STANDBY_MISSING, Primary
from latchkey_service.coherence.verifier_state import Server
from latchkey_service.errors import NotReplicated, StoreUnavailable

from tests.helpers.captured_log import Lines
from tests.helpers.waiting import eventually

FIRST, SECOND = "h1:1", "h2:2"
OLD, NEW = Server("77", "00000001"), Server("77", "00000002")


class FakeConnection:
    """A connection to a host, on which a diagnosis may ask whether commits wait."""

    def __init__(self, host: str, waiting: bool | Exception) -> None:
        self.host = host
        self._waiting = waiting
        self.terminated = False

    async def fetchval(self, _query: str, **_: object) -> bool:
        if isinstance(self._waiting, Exception):
            raise self._waiting
        return self._waiting

    def terminate(self) -> None:
        self.terminated = True


class FakeConnector:
    """Two hosts. Each may be a primary."""

    def __init__(self) -> None:
        self.primaries = {FIRST}
        self.waiting: bool | Exception = False
        self.silent: set[str] = set()
        self.refusals: dict[str, Exception] = {}
        self.proved: list[str] = []
        self.left: list[str] = []
        self.made: list[FakeConnection] = []

    def hosts(self) -> list[str]:
        return [FIRST, SECOND]

    def host_of(self, connection: FakeConnection) -> str:
        return connection.host

    def prove(self, connection: FakeConnection) -> None:
        self.proved.append(connection.host)

    def leave(self, connection: FakeConnection) -> None:
        self.left.append(connection.host)

    async def connect_to(self, host: str) -> FakeConnection:
        if host in self.silent:
            await asyncio.Event().wait()
        if host in self.refusals:
            raise self.refusals[host]
        if host not in self.primaries:
            raise StoreUnavailable("a standby")
        self.made.append(FakeConnection(host, self.waiting))
        return self.made[-1]


class World:
    """A Primary with a connector that a test changes, and what it has reported."""

    def __init__(self) -> None:
        self.connector = FakeConnector()
        self.moved = 0
        self.primary: Any = Primary(self.connector, self._move)  # type: ignore[arg-type]  # a fake

    def _move(self) -> None:
        self.moved += 1

    def connection(self, host: str) -> FakeConnection:
        return FakeConnection(host, self.connector.waiting)

    @contextlib.contextmanager
    def logged(self) -> Iterator[Lines]:
        """Collect what the Primary logs meanwhile."""
        lines = self.primary._log = Lines()
        yield lines

    async def diagnosed(self) -> None:
        await eventually(lambda: self.primary._diagnosis is None, "the diagnosis has ended")


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    # Long enough for a fake, and short enough to wait for where a host is silent.
    monkeypatch.setattr(primary_module, "ASK_SECONDS", 0.2)
    world = World()
    yield world
    await world.primary.close()
    assert all(connection.terminated for connection in world.connector.made)


async def test_each_change_of_the_server_is_logged(world: World) -> None:
    """The log names address, system identifier and timeline with the first renewal and at each
    change, and only then. Other connections follow every change, not the first renewal."""
    primary = world.primary
    assert primary.host == ""
    steps = [(FIRST, OLD), (FIRST, OLD), (SECOND, NEW), (SECOND, NEW), (SECOND, OLD)]
    moves = []
    with world.logged() as log:
        for host, server in steps:
            primary.renewed(world.connection(host), server)
            assert primary.host == host
            moves.append(world.moved)
    assert moves == [0, 0, 1, 1, 2]
    assert world.connector.proved == [host for host, _ in steps]
    found = [(e["address"], e["system_identifier"], e["timeline"]) for e in log]
    assert found == [(FIRST, *OLD), (SECOND, *NEW), (SECOND, *OLD)]
    assert {entry["event"] for entry in log} == {"database server"}


async def test_a_failure_leaves_the_host(world: World) -> None:
    """A renewal that hangs, or is not replicated, leaves the connection's host. After a failure
    to connect, the process leaves no host, because the connector has tried all of them.
    """
    hung = StoreUnavailable("no answer")
    hung.__cause__ = TimeoutError()
    world.primary.failed(world.connection(FIRST), hung)
    world.primary.failed(None, hung)
    assert world.connector.left == [FIRST]
    await world.diagnosed()
    assert world.primary.warnings() == []
    world.primary.failed(world.connection(SECOND), NotReplicated("not replicated"))
    assert world.connector.left == [FIRST, SECOND]


async def test_one_failure_that_passes_leaves_no_host(world: World) -> None:
    """After a failure because of a lock, the process stays on its host, because the next host
    may be a deposed primary. It moves only after a second failure in a row.
    """
    locked = StoreUnavailable("no answer")
    locked.__cause__ = asyncpg.LockNotAvailableError()
    world.primary.failed(world.connection(FIRST), locked)
    world.primary.renewed(world.connection(FIRST), OLD)
    world.primary.failed(world.connection(FIRST), locked)
    assert world.connector.left == []
    world.primary.failed(world.connection(FIRST), locked)
    assert world.connector.left == [FIRST]
    await world.diagnosed()


async def test_a_commit_that_was_not_replicated_is_reported(world: World) -> None:
    """A renewal whose wait for the standby was cancelled shows that the standby is missing. The log
    says so once; `status` says so until a renewal succeeds."""
    with world.logged() as log:
        for _ in range(3):
            world.primary.failed(world.connection(FIRST), NotReplicated("not replicated"))
        assert world.primary.warnings() == [STANDBY_MISSING]
        world.primary.renewed(world.connection(FIRST), OLD)
    assert world.primary.warnings() == []
    events = [(entry["log_level"], entry["event"]) for entry in log]
    assert events.count(("error", STANDBY_MISSING)) == 1
    assert ("info", "commits are replicated again") in events


async def test_commits_that_hang_are_diagnosed(world: World) -> None:
    """After a renewal without an answer, the host is asked whether commits wait for a standby."""
    world.connector.waiting = True
    world.primary.failed(world.connection(FIRST), StoreUnavailable("no answer"))
    # A second failure meanwhile starts no second diagnosis.
    world.primary.failed(world.connection(FIRST), StoreUnavailable("no answer"))
    await world.diagnosed()
    assert world.primary.warnings() == [STANDBY_MISSING]
    assert len(world.connector.made) == 1


@pytest.mark.parametrize("answer", [False, StoreUnavailable("gone"), RuntimeError("a bug")])
async def test_a_diagnosis_that_finds_nothing_says_nothing(
    world: World, answer: bool | Exception
) -> None:
    """A host where no commit waits, or that does not answer, gives no reason to blame the
    standby. The next failure is diagnosed again."""
    world.connector.waiting = answer
    for attempt in (1, 2):
        world.primary.failed(world.connection(FIRST), StoreUnavailable("no answer"))
        await world.diagnosed()
        assert world.primary.warnings() == []
        assert len(world.connector.made) == attempt


async def test_a_diagnosis_ends_although_the_host_is_silent(world: World) -> None:
    """A host that accepts a connection and never answers does not keep a diagnosis alive."""
    world.connector.silent = {FIRST}
    world.primary.failed(world.connection(FIRST), StoreUnavailable("no answer"))
    await world.diagnosed()
    assert world.primary.warnings() == []


async def test_another_primary_is_reported_once_and_until_it_is_gone(world: World) -> None:
    """Another host that accepts writes is named in the log when it appears and in status as long as
    it does, with the host that the lease stands on. A host that does not answer does not count as a
    primary."""
    primary, connector = world.primary, world.connector
    await primary.look_at_others()
    assert primary.warnings() == []
    primary.renewed(world.connection(SECOND), NEW)
    with world.logged() as log:
        for _ in range(2):
            await primary.look_at_others()
            (warning,) = primary.warnings()
            assert FIRST in warning
            assert f"renewed on {SECOND}" in warning
        connector.silent = {FIRST}
        await primary.look_at_others()
        assert primary.warnings() == []
        connector.silent, connector.primaries = set(), {SECOND}
        await primary.look_at_others()
        assert primary.warnings() == []
    assert [(entry["log_level"], entry["event"]) for entry in log] == [
        ("warning", "another host of the list also says that it is the primary"),
        ("info", "no other host of the list says that it is the primary"),
    ]
    assert (log[0]["hosts"], log[0]["lease_on"]) == ((FIRST,), SECOND)


async def test_a_lease_that_moves_no_longer_warns_of_its_own_host(world: World) -> None:
    """When the lease moves to the host that a warning named, the warning does not call that host
    the other one."""
    primary, connector = world.primary, world.connector
    connector.primaries = {FIRST, SECOND}
    primary.renewed(world.connection(FIRST), OLD)
    await primary.look_at_others()
    primary.renewed(world.connection(SECOND), NEW)
    assert primary.warnings() == []
    await primary.look_at_others()
    (warning,) = primary.warnings()
    assert warning.partition(":")[2].startswith(f" {FIRST}.")


async def test_a_host_that_refuses_the_role_is_not_a_primary(world: World) -> None:
    """Its error is one that the driver's translation leaves as it is, such as a missing right to
    connect. The worker continues: it would end if one of its tasks failed."""
    world.primary.renewed(world.connection(FIRST), OLD)
    world.connector.refusals[SECOND] = asyncpg.InsufficientPrivilegeError("no right to connect")
    await world.primary.look_at_others()
    assert world.primary.warnings() == []
