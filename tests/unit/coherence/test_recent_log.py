"""The log that the lead of a host keeps for its siblings."""

import pytest
from latchkey_coherence.verdict_cache import NOWHERE, Position
from latchkey_service.coherence import recent_log
from latchkey_service.coherence.log import EVERY_TOKEN, Change
from latchkey_service.coherence.recent_log import RecentLog

from tests.helpers.positions import at
from tests.unit.coherence.scene import Scene, log


def test_changes_after_a_known_position() -> None:
    """A reader gets exactly the changes after its position, in order."""
    recent = RecentLog(at(5))
    changes = [Change(at(n), (f"t{n}",)) for n in (6, 7, 8)]
    for change in changes:
        recent.append(change)
    assert recent.after(at(5)) == tuple(changes)
    assert recent.after(at(7)) == (changes[2],)
    assert recent.after(at(8)) == ()


def test_other_positions_are_not_known() -> None:
    """A position of another history, or without a mark, is not known, whatever its revision."""
    recent = RecentLog(at(5))
    recent.append(Change(at(6), ("t",)))
    assert recent.after(Position(6, at(6).mark + 1)) is None
    assert recent.after(at(4)) is None
    assert recent.after(Position(5, 0)) is None
    recent.restart(NOWHERE)
    assert recent.after(NOWHERE) is None


def test_the_oldest_changes_are_forgotten_with_their_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The log is bounded, and never returns an incomplete list of changes."""
    monkeypatch.setattr(recent_log, "HISTORY_MAX", size_max := 100)
    recent = RecentLog(at(0))
    for n in range(1, size_max):
        recent.append(Change(at(n), (f"t{n}",)))
    known = [n for n in range(size_max) if recent.after(at(n)) is not None]
    assert 0 < known[0] == size_max - len(known)
    for n in known:
        changes = recent.after(at(n))
        assert changes is not None
        assert [c.position.revision for c in changes] == list(range(n + 1, size_max))


def test_a_change_of_every_token_keeps_earlier_positions() -> None:
    """After InvalidateAll, a sibling at an earlier position is on the same history: it empties its
    cache and keeps its lease, although the lead's cache has forgotten that position.
    """
    scene = Scene(at(5))
    scene.apply((at(6), EVERY_TOKEN))
    assert not scene.state.cache.knows(at(5))
    assert scene.state.recent.after(at(5)) == (Change(at(6), (EVERY_TOKEN,)),)


def test_a_lost_history_is_forgotten() -> None:
    """After the loss of its history, a process knows no position of it."""
    scene = Scene(at(5))
    scene.state.apply(log(at(2), known=False), scene.now)
    assert scene.state.recent.after(at(5)) is None
