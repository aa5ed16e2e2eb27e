"""No schedule of faults makes the shipped classes exceed the bound of a rate limit (rule 13)."""

import contextlib
import math
from collections import Counter
from random import Random
from typing import Any
from unittest import mock

import pytest
from latchkey import _shares
from latchkey_coherence import rate
from latchkey_coherence.rate import Draw, RateLimit, Share

from tests.simulation.database import Database
from tests.simulation.rates import Meter, ServerRates
from tests.simulation.world import World

STEPS = 250
# For each broken part of the rule, one of the first seven of these seeds exceeds the bound. With
# other seeds, it may be one in fifty.
SEEDS = range(40, 70)
MORE_SEEDS = range(70, 370)
SEEDS_FOR_A_MUTANT = range(40, 240)


def run(seed: int) -> World:
    """Run a new world to its end, or until it exceeds the bound."""
    random = Random(seed)  # noqa: S311 - a schedule, not a secret
    # Without timelines, a server may draw from a deposed primary until the next change to a token
    # shows that its history is another one.
    world = World(random, timelines=True, limited=True)
    for _ in range(STEPS):
        world.step(random.choice(world.kinds))
        if world.excess:
            break
    return world


@pytest.mark.parametrize(
    "seeds",
    [SEEDS, pytest.param(MORE_SEEDS, marks=pytest.mark.slow("simulates hundreds of schedules"))],
)
def test_the_bound_holds_under_any_schedule(seeds: range) -> None:
    """No schedule exceeds the bound, or makes a deleted token valid. Servers and clients spend
    calls, and refuse; draws of deposed primaries come too, and do not count.
    """
    counts: Counter[str] = Counter()
    for seed in seeds:
        world = run(seed)
        assert not world.excess, (seed, world.excess)
        assert not world.stale, (seed, world.stale)
        counts.update(world.counts)
    for what in ("by a server", "by a client", "rate limited", "drawn", "failovers"):
        assert counts[what] > len(seeds) / 2, counts
    assert counts["draws refused"] > len(seeds)


def test_the_meter_is_the_bound() -> None:
    """The meter permits b + r calls at once, and r more in each further second."""
    meter = Meter(RateLimit(2, 1, 3))
    assert [meter.accept(10.0) for _ in range(6)] == [True] * 5 + [False]
    meter = Meter(RateLimit(2, 1, 3))
    assert all(meter.accept(10.0) for _ in range(5))
    assert [meter.accept(11.0) for _ in range(3)] == [True, True, False]


create = Share.__init__
add = Share.add


def draw_without_a_trace(
    self: Database, token_id: str, limit: RateLimit, needed: int, ahead: int, now: float
) -> Draw:
    """The bucket does not know what it has issued."""
    return rate.draw(limit, self.full_at.get(token_id, 0), int(now * 1e6), needed, ahead)


def spend_and_keep(self: Share, now: float) -> bool:
    """A call that is spent stays in the share."""
    return any(now < ends for _, ends in self._parts)


def add_twice(self: Share, calls: int, ends: float) -> None:
    """An answer counts twice."""
    add(self, calls, ends)
    add(self, calls, ends)


def begin_with_a_burst(self: Share, token_id: str, limit: RateLimit) -> None:
    """A verifier that starts may accept a burst without asking."""
    create(self, token_id, limit)
    add(self, limit.burst, math.inf)


def accept_under_a_lease(self: ServerRates, _snapshot: Any, _began: Any) -> bool:
    """A draw counts whatever the history that it was made on."""
    return self._server.clock() < self._server.state.lease_ends


# The owner, the attribute and its replacement. All replacements of an entry apply together.
MUTANTS: dict[str, list[tuple[Any, str, Any]]] = {
    "a draw leaves no trace": [(Database, "draw", draw_without_a_trace)],
    "calls do not end": [
        (rate, "share_end", lambda began: began + 60.0),
        (_shares, "share_end", lambda began, seconds: began + 60.0),
    ],
    "a call is spent and kept": [(Share, "spend", spend_and_keep)],
    "an answer counts twice": [(Share, "add", add_twice)],
    "a verifier begins with a burst": [(Share, "__init__", begin_with_a_burst)],
    "a draw of any history counts": [(ServerRates, "_accepts", accept_under_a_lease)],
}

# A seed that exceeded the bound when this was written, tried first to save time.
HINTS = dict(zip(MUTANTS, (40, 46, 40, 41, 40, 40), strict=True))


@pytest.mark.parametrize("name", MUTANTS)
def test_each_part_of_the_rule_is_needed(name: str) -> None:
    """If one part of the rule is broken, the simulation exceeds the bound."""
    with contextlib.ExitStack() as broken:
        for where, attribute, instead in MUTANTS[name]:
            broken.enter_context(mock.patch.object(where, attribute, instead))
        assert any(run(seed).excess for seed in (HINTS[name], *SEEDS_FOR_A_MUTANT)), name
