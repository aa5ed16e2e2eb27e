"""What clients have confirmed: nobody who may still answer is left out, and nobody else counts."""

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from latchkey_service.coherence.subleases import SubLease, SubLeases


class AgainstAPlainList(RuleBasedStateMachine):
    """The floor is the least that a client with a live lease has confirmed."""

    def __init__(self) -> None:
        super().__init__()
        self.leases = SubLeases()
        self.clients = [SubLease() for _ in range(4)]
        self.plain: list[tuple[int, float]] = [(0, -math.inf)] * 4
        self.now = 0.0
        self.applied = 0

    @rule(seconds=st.floats(0.1, 3.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def something_is_applied(self) -> None:
        self.applied += 1

    @rule(n=st.integers(0, 3), seconds=st.floats(0.1, 3.0))
    def grant(self, n: int, seconds: float) -> None:
        confirmed, ends = self.plain[n]
        if ends <= self.now:
            confirmed = self.applied
        self.plain[n] = (confirmed, max(ends, self.now + seconds))
        self.leases.grant(self.clients[n], self.applied, self.now + seconds, self.now)

    @rule(n=st.integers(0, 3), data=st.data())
    def confirm(self, n: int, data: st.DataObject) -> None:
        revision = data.draw(st.integers(0, self.applied))
        if self.plain[n][1] > self.now:
            self.plain[n] = (revision, self.plain[n][1])
        self.leases.acknowledge(self.clients[n], revision)

    @rule(n=st.integers(0, 3))
    def release(self, n: int) -> None:
        self.plain[n] = (0, -math.inf)
        self.leases.release(self.clients[n])

    @invariant()
    def the_floor_is_right(self) -> None:
        live = [confirmed for confirmed, ends in self.plain if ends > self.now]
        assert self.leases.floor(self.now) == min(live, default=None)
        if live:
            lowest = [e for c, e in self.plain if e > self.now and c == min(live)]
            assert self.leases.pinned_until in lowest
            assert self.leases.latest_end(self.now) >= max(e for _, e in self.plain)


AgainstAPlainList.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None
)
test_floor = AgainstAPlainList.TestCase
