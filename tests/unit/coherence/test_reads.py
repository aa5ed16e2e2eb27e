"""Which reads of the database a process accepts.

These tests state the server's side of rule 12, which random schedules of `tests/simulation` reach
too rarely.
"""

import pytest
from latchkey_coherence.verdict_cache import NOWHERE, Position
from latchkey_service.coherence.reads import ReadBegan, Standing
from latchkey_service.coherence.snapshot import Snapshot
from latchkey_service.coherence.verifier_state import EVERY_TOKEN, Change, Log, Server

from tests.helpers.positions import at
from tests.unit.coherence.scene import PRIMARY, Scene, caught_up, log

PROMOTED = Server(PRIMARY.identifier, "00000002")


@pytest.fixture
def scene() -> Scene:
    """A process that has applied 11 and 13, and has a token in its cache."""
    return caught_up()


def snapshot(position: Position, timeline: str | None = PRIMARY.timeline) -> Snapshot:
    return Snapshot(position, timeline)


@pytest.mark.parametrize(
    ("position", "began", "expected"),
    [
        (at(13), 13, Standing.BELIEVED),
        (at(13), 10, Standing.BELIEVED),
        (at(11), 11, Standing.BELIEVED),
        (at(11), 10, Standing.BELIEVED),
        (at(11), 13, Standing.REFUSED),
        (at(12), 10, Standing.REFUSED),
        (at(9), 9, Standing.REFUSED),
        (at(13, 2), 13, Standing.REFUSED),
        (Position(13, 0), 13, Standing.REFUSED),
        (NOWHERE, 0, Standing.REFUSED),
        (at(14), 13, Standing.AHEAD),
        (at(14, 2), 13, Standing.AHEAD),
    ],
)
def test_which_reads_are_believed(
    scene: Scene, position: Position, began: int, expected: Standing
) -> None:
    """A read is accepted if its position is known by its mark and is not older than the position
    that was applied when the read was sent.
    """
    read = ReadBegan(began, scene.state.epoch)
    assert read.standing(snapshot(position), scene.state) is expected


@pytest.mark.parametrize("timeline", ["00000002", None])
def test_a_read_from_another_timeline_is_refused(scene: Scene, timeline: str | None) -> None:
    """A read from a standby, or from a server that was promoted or deposed since, is refused even
    at a known position."""
    began = ReadBegan.now(scene.state)
    assert began.standing(snapshot(at(13), timeline), scene.state) is Standing.REFUSED


def test_without_timelines_marks_tell_servers_apart(scene: Scene) -> None:
    """If the lease's server reports no timeline, a read without a timeline is judged by its
    mark."""
    scene.state.apply(log(at(13), server=Server(None, None)), scene.now)
    began = ReadBegan.now(scene.state)
    assert began.standing(snapshot(at(13), None), scene.state) is Standing.BELIEVED
    assert began.standing(snapshot(at(13, 2), None), scene.state) is Standing.REFUSED


def test_a_read_ahead_is_believed_once_the_log_has_its_position(scene: Scene) -> None:
    """A read ahead is refused if the log has its revision with another mark."""
    began = ReadBegan.now(scene.state)
    scene.apply((at(14), "c"))
    assert began.standing(snapshot(at(14)), scene.state) is Standing.BELIEVED
    assert began.standing(snapshot(at(14, 2)), scene.state) is Standing.REFUSED


@pytest.mark.parametrize("how", ["lost", "another timeline", "every token"])
def test_a_read_sent_before_the_cache_started_over_is_refused(scene: Scene, how: str) -> None:
    """Such a read was permitted by a lease on another history, even if its position is known
    again."""
    state = scene.state
    began = ReadBegan.now(state)
    server = PRIMARY
    if how == "lost":
        state.lose()
        state.register(at(13), 0, PRIMARY, 100.0)
    elif how == "another timeline":
        server = PROMOTED
        state.apply(log(at(13), server=PROMOTED), scene.now)
    else:
        state.apply(Log(True, PRIMARY, at(14), (Change(at(14), (EVERY_TOKEN,)),)), scene.now)
    scene.renew()
    position = state.cache.position
    assert began.standing(snapshot(position, server.timeline), state) is Standing.REFUSED
    again = ReadBegan.now(state)
    assert again.standing(snapshot(position, server.timeline), state) is Standing.BELIEVED
