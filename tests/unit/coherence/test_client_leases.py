"""What clients have confirmed: every lease that may be live counts, and nothing else does."""

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from latchkey_coherence.verdict_cache import Entry, VerdictCache
from latchkey_service.coherence.client_leases import ClientLease, ClientLeases
from latchkey_service.coherence.verifier_state import Change, Log, Server, VerifierState

from tests.helpers.positions import at


class AgainstAPlainList(RuleBasedStateMachine):
    """The floor is the lowest revision confirmed by a client with a live lease."""

    def __init__(self) -> None:
        super().__init__()
        self.leases = ClientLeases()
        self.clients = [ClientLease(f"client {n}") for n in range(4)]
        self.plain: list[tuple[int, float]] = [(0, -math.inf)] * 4
        self.now = 0.0
        self.applied = 0

    @rule(seconds=st.floats(0.1, 3.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def something_is_applied(self) -> None:
        self.applied += 1

    @rule(n=st.integers(0, 3), seconds=st.floats(0.1, 3.0), data=st.data())
    def grant(self, n: int, seconds: float, data: st.DataObject) -> None:
        """A client gets a lease once it has confirmed everything it was sent."""
        confirmed = data.draw(st.integers(0, self.applied))
        self.plain[n] = (confirmed, max(self.plain[n][1], self.now + seconds))
        self.leases.grant(self.clients[n], confirmed, self.now + seconds)

    @rule(n=st.integers(0, 3), data=st.data())
    def confirm(self, n: int, data: st.DataObject) -> None:
        revision = data.draw(st.integers(0, self.applied))
        if self.plain[n][1] > self.now:
            self.plain[n] = (revision, self.plain[n][1])
        self.leases.confirm(self.clients[n], revision)

    @rule()
    def lose_the_history(self) -> None:
        """All confirmations are void. The end of each lease stays the same."""
        self.plain = [(0, ends) for _, ends in self.plain]
        self.leases.unconfirm()

    @rule(n=st.integers(0, 3))
    def release(self, n: int) -> None:
        self.plain[n] = (0, -math.inf)
        self.leases.release(self.clients[n])

    @rule()
    def sweep(self) -> None:
        self.leases.sweep(self.now)

    @invariant()
    def the_floor_is_right(self) -> None:
        live = [confirmed for confirmed, ends in self.plain if ends > self.now]
        assert self.leases.floor(self.now) == min(live, default=None)
        if live:
            lowest = [e for c, e in self.plain if e > self.now and c == min(live)]
            assert self.leases.pinned_until in lowest
            assert self.leases.latest_end(self.now) >= max(e for _, e in self.plain)

    @invariant()
    def clients_behind_are_named(self) -> None:
        """Every live client is either counted as done or named as behind."""
        for revision in range(self.applied + 1):
            done = [c >= revision for c, ends in self.plain if ends > self.now]
            assert self.leases.count_confirmed(revision, self.now) == sum(done)
            behind = [
                f"client {n}"
                for n, (confirmed, ends) in enumerate(self.plain)
                if ends > self.now and confirmed < revision
            ]
            assert self.leases.behind(revision, self.now, 10) == behind


AgainstAPlainList.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
test_floor = AgainstAPlainList.TestCase


def test_only_leases_that_delayed_a_revision_count_as_waited_out() -> None:
    """A lease that ended before the revision arrived, or whose client had confirmed it, was not
    waited for."""
    leases = ClientLeases()
    clients = {name: ClientLease(name) for name in ("early", "late", "done")}
    leases.grant(clients["early"], 4, 99.0)
    leases.grant(clients["late"], 4, 101.0)
    leases.grant(clients["done"], 5, 103.0)
    assert leases.floor(98.0, math.inf) == 4
    assert leases.floor(100.5, behind_since=100.0) == 4
    assert leases.outwaited == 0
    assert leases.floor(102.0, behind_since=100.0) == 5
    assert leases.outwaited == 1
    leases.confirm(clients["done"], 6)
    leases.release(clients["done"])
    assert leases.floor(102.0, behind_since=100.0) is None
    assert leases.outwaited == 1, "it let go by itself"


def test_number_of_named_clients_is_limited() -> None:
    """However many clients are behind, at most the requested number is named, furthest behind
    first."""
    leases = ClientLeases()
    for n in range(100):
        leases.grant(ClientLease(f"client {n:02}"), n, 101.0)
    assert leases.behind(200, 100.0, 3) == ["client 00", "client 01", "client 02"]
    assert leases.behind(1, 100.0, 3) == ["client 00"]
    assert leases.behind(200, 102.0, 3) == []


def verifier(applied: int) -> VerifierState[Entry]:
    """Return a process that has applied a revision."""
    state: VerifierState[Entry] = VerifierState(VerdictCache(10), ClientLeases(), 3.0)
    server = Server("1", "00000001")
    state.register(at(applied), applied, server, 0.0)
    return state


def apply(state: VerifierState[Entry], revision: int, began: float) -> None:
    change = Change(at(revision), ("t",))
    state.apply(Log(True, state.server, at(revision), (change,)), began)


def test_a_client_that_confirmed_was_not_waited_out() -> None:
    """Of two leases that have ended when the floor is computed, only the one that was behind
    counts."""
    state = verifier(4)
    for name, confirmed in (("behind", 4), ("level", 5)):
        state.client_leases.grant(ClientLease(name), confirmed, 101.0)
    apply(state, 5, 100.0)
    assert state.acknowledgeable(100.5) == 4
    assert state.acknowledgeable(102.0) == 5
    assert state.client_leases.outwaited == 1


def test_every_client_that_was_waited_out_counts() -> None:
    """A lease counts even if it ends while another client is waited for still longer."""
    state = verifier(4)
    for name, ends in (("first", 101.0), ("second", 102.0), ("last", 104.0)):
        state.client_leases.grant(ClientLease(name), 4, ends)
    apply(state, 5, 100.0)
    assert state.acknowledgeable(100.5) == 4
    for now in (101.5, 103.0):
        state.sweep(now)
        assert state.acknowledgeable(now) == 4
    assert state.acknowledgeable(105.0) == 5
    state.sweep(105.0)
    assert state.client_leases.outwaited == 3


def test_a_client_that_does_not_confirm_a_reset_is_waited_for_and_named() -> None:
    """A Delete on the new history waits for the client's old lease, so operators should see whose
    it is."""
    state = verifier(4)
    state.client_leases.grant(ClientLease("slow"), 4, 103.0)
    state.lose()
    state.register(at(7, history=2), 0, Server("1", "00000002"), 0.0)
    assert state.acknowledgeable(100.0) == 0
    seconds, names = state.waiting_for(101.0)
    assert (seconds, names) == (1.0, ["slow"])
    assert state.acknowledgeable(104.0) == 7
    assert state.client_leases.outwaited == 1
    assert state.waiting_for(105.0) == (0.0, [])
