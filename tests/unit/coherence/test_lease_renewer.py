"""What the log says about the lease."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from latchkey_coherence.lease import boottime
from latchkey_coherence.verdict_cache import Position, VerdictCache
from latchkey_service.coherence import lease_renewer
from latchkey_service.coherence.client_leases import ClientLeases
from latchkey_service.coherence.lease_renewer import LeaseRenewer
from latchkey_service.coherence.verifier_state import Log, VerifierState
from latchkey_service.coherence.verifier_table import Identity, Registration
from latchkey_service.errors import StoreUnavailable

from tests.helpers.captured_log import Lines
from tests.helpers.positions import at
from tests.helpers.waiting import eventually
from tests.unit.coherence.scene import PRIMARY, log

HOST = "h1:1"


class Database:
    """The statements of a lease renewer, on a history that a test changes."""

    def __init__(self) -> None:
        self.head = at(5)
        self.failures = 0
        self.registrations = 0
        # Keeps a registration from being answered.
        self.answers = asyncio.Event()
        self.answers.set()

    async def register(self, _incarnation: int, **_: object) -> Registration:
        await self.answers.wait()
        self.registrations += 1
        return Registration(self.head, self.head.revision, PRIMARY)

    async def read_log(self, applied: Position) -> Log:
        return log(self.head, known=applied == self.head)

    async def renew(self, _incarnation: int, applied: Position, *_: object) -> tuple[bool, Log]:
        if self.failures:
            self.failures -= 1
            raise StoreUnavailable("no answer")
        return applied == self.head, await self.read_log(applied)

    async def all_rows(self) -> list[Any]:
        return []


class Primary:
    """One host, whose connections are fakes."""

    async def connect(self) -> Any:
        return SimpleNamespace(is_closed=lambda: False, terminate=lambda: None)

    def host_of(self, _connection: object) -> str:
        return HOST

    def renewed(self, *_: object) -> None: ...

    def failed(self, *_: object) -> None: ...

    def warnings(self) -> list[str]:
        return []


async def test_another_history_is_logged_and_is_no_renewal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A renewal fails, and the next connection leads to another history. The log names the server
    of that history. It says that the lease is renewed again only once it is."""
    database = Database()
    monkeypatch.setattr(lease_renewer, "OwnRow", lambda *_: database)
    state: VerifierState[Any] = VerifierState(VerdictCache(10), ClientLeases(), 3.0)
    primary: Any = Primary()
    renewer = LeaseRenewer(state, Identity("ver_own", "host", 1, "0", 3.0), primary, boottime)
    logged: Any = Lines()
    renewer._log = logged
    running = asyncio.create_task(renewer.run())

    def events() -> list[str]:
        return [line["event"] for line in logged]

    await eventually(renewer.has_lease, "there is a lease")
    database.failures, database.head = 1, at(5, history=2)
    database.answers.clear()
    # Due at once, which a renewal is only every third of a lease otherwise.
    renewer._next_renewal = 0.0
    renewer._news = False
    renewer.wake_to_acknowledge()
    await eventually(lambda: "starting over" in events()[-1], "the loss is logged")
    assert events().count("the lease is renewed again") == 0
    assert logged[-1]["address"] == HOST
    assert logged[-1]["timeline"] == PRIMARY.timeline
    database.answers.set()
    await eventually(renewer.has_lease, "there is a lease again")
    await eventually(lambda: "the lease is renewed again" in events(), "it is logged")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
