"""What a sibling takes from a log that the lead of its host sends without a question."""

from unittest import mock

import pytest
from latchkey_coherence.verdict_cache import NOWHERE, Position
from latchkey_service.coherence.host_lead import UNASKED_MAX, HostLead, Sibling, UnaskedLog
from latchkey_service.coherence.log import Change, Log
from latchkey_service.coherence.recent_log import RecentLog

from tests.helpers.positions import at
from tests.unit.coherence.scene import PRIMARY, Scene

UNASKED = UnaskedLog(
    at(5), Log(True, PRIMARY, at(7), (Change(at(6), ("a",)), Change(at(7), ("b",))))
)


@pytest.mark.parametrize(
    ("applied", "tokens"),
    [
        (at(5), ["a", "b"]),
        (at(6), ["b"]),
        (at(7), None),
        (at(8), None),
        (at(4), None),
        (Position(5, 77), None),
        (Position(6, 77), None),
        (NOWHERE, None),
    ],
)
def test_an_unasked_log_follows_only_its_own_positions(
    applied: Position, tokens: list[str] | None
) -> None:
    """A sibling that has applied more, or has started over, applies the rest or nothing."""
    log = UNASKED.following(applied)
    found = log and [token for change in log.changes for token in change.token_ids]
    assert found == tokens
    assert log is None or log.head == at(7)


def test_a_sibling_far_behind_costs_the_lead_nothing() -> None:
    """The lead does not collect thousands of changes for each news to a sibling that is stopped."""
    lead, sibling = Scene(at(5)), Sibling()
    rules = HostLead(lead.state, lambda: 1)
    rules.register(sibling, acknowledge=True)
    lead.apply((at(6), "t"))
    assert rules.unasked_log(sibling) is not None
    lead.apply(*((at(7 + number), "t") for number in range(UNASKED_MAX)))
    with mock.patch.object(RecentLog, "after", side_effect=AssertionError):
        assert rules.unasked_log(sibling) is None
