"""The processes of a host that share a lease keep the promise, and need each of their rules."""

import contextlib
import math
from collections import Counter
from random import Random
from typing import Any
from unittest import mock

import pytest
from latchkey_service.coherence.host_lead import HostLead, Renewal, UnaskedLog
from latchkey_service.coherence.host_lead import Sibling as Record
from latchkey_service.coherence.log import Log
from latchkey_service.coherence.recent_log import RecentLog
from latchkey_service.coherence.verifier_state import VerifierState

from tests.simulation.hosts import HostWorld, Sibling

STEPS = 300
SEEDS = 300
SEEDS_FOR_A_MUTANT = 1_500


def run(seed: int, steps: int = STEPS, *, sends_logs: bool = False) -> HostWorld:
    """Run a new world to its end, or until it gives a stale answer.

    With `sends_logs`, the lead sends logs without a question, so that siblings lag less.
    """
    random = Random(seed)  # noqa: S311 - a schedule, not a secret
    world = HostWorld(random, sends_logs=sends_logs)
    for _ in range(steps):
        world.step(random.choice(world.kinds))
        if world.stale:
            break
    return world


def test_no_stale_answer_under_any_schedule() -> None:
    """No schedule violates the promise. The schedules include moves in both directions."""
    counts: Counter[str] = Counter()
    for seed in range(SEEDS):
        world = run(seed, sends_logs=bool(seed % 2))
        assert not world.stale, (seed, world.stale)
        counts.update(world.counts)
    for what in ("valid", "deleted", "confirmed", "outwaited", "shared a lease", "left the lead"):
        assert counts[what] > SEEDS / 2, counts
    assert counts["returned"] > SEEDS / 10, counts
    assert counts["applied without a question"] > SEEDS / 4, counts


renew = HostLead.renew
adopt = HostLead.adopt
unasked_log = HostLead.unasked_log


def renew_without_a_record(
    self: HostLead, sibling: Record, applied: Any, acknowledged: int
) -> Renewal:
    """Rule 7 broken: the lead's row acknowledges without the siblings."""
    log = self.log_after(sibling, applied)
    return Renewal(log.known, log, self._state.lease_ends if log.known else -math.inf)


def renew_and_confirm_all(
    self: HostLead, sibling: Record, applied: Any, _acknowledged: int
) -> Renewal:
    """Rule 7 broken: the lead counts what it has sent as confirmed."""
    result = renew(self, sibling, applied, applied.revision)
    if result.renewed:
        self._state.client_leases.confirm(sibling.lease, self._state.cache.position.revision)
    return result


def renew_for_longer(self: HostLead, sibling: Record, applied: Any, acknowledged: int) -> Renewal:
    """Rule 6 broken: the sibling's lease outlasts the lease that the lead has recorded."""
    return renew(self, sibling, applied, acknowledged)._replace(ends=math.inf)


def adopt_without_a_record(self: HostLead, *arguments: Any) -> bool:
    """Rule 7 broken: the sibling's row is removed before the lead has recorded its lease."""
    sibling = arguments[0]
    done = adopt(self, *arguments)
    if done:
        self._state.client_leases.release(sibling.lease)
    return done


def adopt_what_is_behind(
    self: HostLead,
    sibling: Record,
    applied: Any,
    acknowledged: int,
    ends: float,
    server: Any,
    now: float,
) -> bool:
    """Rule 8 broken: a row is removed although the lead's row has acknowledged more."""
    state = self._state
    if not self.ready(now) or state.recent.after(applied) is None:
        return False
    sibling.incarnation = self.incarnation()
    state.client_leases.grant(sibling.lease, acknowledged, ends)
    return True


def send_only_what_is_new(self: HostLead, sibling: Record) -> UnaskedLog | None:
    """Breaks rule 3, with the next mutant: the lead assumes that what it has sent is applied."""
    unasked = unasked_log(self, sibling)
    if unasked is not None:
        sibling.applied = unasked.log.head
    return unasked


def follow_any_position(self: UnaskedLog, _applied: Any) -> Log:
    """Rule 12 broken: a log is applied whatever position it follows."""
    return self.log


def release_at_once(self: Sibling) -> None:
    """Rule 7 broken: the lead's record goes before the sibling has a row."""
    if self.shared:
        self._release(self.connection)
    gives_up(self)


gives_up = Sibling.gives_up

MUTANTS: dict[str, list[tuple[Any, str, Any]]] = {
    "the lead acknowledges without siblings": [(HostLead, "renew", renew_without_a_record)],
    "the lead counts as confirmed what it sent": [(HostLead, "renew", renew_and_confirm_all)],
    "a lease outlasts its record": [(HostLead, "renew", renew_for_longer)],
    "the row goes before the record": [(HostLead, "adopt", adopt_without_a_record)],
    "a sibling that is behind returns": [(HostLead, "adopt", adopt_what_is_behind)],
    "a sent log follows any position": [
        (HostLead, "unasked_log", send_only_what_is_new),
        (UnaskedLog, "following", follow_any_position),
    ],
    "the record goes before the row": [(Sibling, "gives_up", release_at_once)],
    "every position is known": [(RecentLog, "after", lambda self, position: ())],
    "the log is not applied": [(VerifierState, "apply", lambda self, log, began: False)],
}


# A seed that gave a stale answer when this was written, tried first to save time.
HINTS = dict(zip(MUTANTS, (82, 279, 98, 440, 1_226, 320, 359, 3, 0), strict=True))


@pytest.mark.parametrize("name", MUTANTS)
def test_each_rule_is_needed(name: str) -> None:
    """Without the rule, the simulation finds a stale answer."""
    with contextlib.ExitStack() as broken:
        for where, attribute, instead in MUTANTS[name]:
            broken.enter_context(mock.patch.object(where, attribute, instead, create=True))
        sends_logs = name == "a sent log follows any position"
        assert any(
            run(seed, sends_logs=sends_logs).stale
            for seed in (HINTS[name], *range(SEEDS_FOR_A_MUTANT))
        ), name
