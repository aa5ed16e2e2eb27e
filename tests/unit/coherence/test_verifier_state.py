"""A process as a verifier: the reads that it accepts, and the changes that it applies and
acknowledges.

These tests state the server's side of rule 12, which random schedules of `tests/simulation` reach
too rarely.
"""

import math

import pytest
from latchkey_coherence.lease import LEASE_SECONDS_MAX
from latchkey_coherence.verdict_cache import NOWHERE, Entry, Position
from latchkey_service.coherence.client_leases import ClientLease
from latchkey_service.coherence.snapshot import Snapshot, mark_in, mark_out
from latchkey_service.coherence.verifier_state import (
    EVERY_TOKEN,
    Change,
    Log,
    ReadBegan,
    Server,
    Standing,
)

from tests.helpers.positions import at
from tests.unit.coherence.scene import LEASE_SECONDS, PRIMARY, Scene, log

PROMOTED = Server(PRIMARY.identifier, "00000002")
RESTORED = Server("7001", PRIMARY.timeline)


@pytest.fixture
def scene() -> Scene:
    """A process that started at revision 10, has applied 11 and 13, and has a token in its
    cache."""
    scene = Scene(at(10))
    scene.apply((at(11), "a"), (at(13), "b"))
    scene.renew()
    assert scene.state.cache.store(b"k", Entry("t", math.inf), at(13))
    return scene


def snapshot(position: Position, timeline: str | None = PRIMARY.timeline) -> Snapshot:
    return Snapshot(position, timeline)


# Reads.


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
    assert scene.state.standing(snapshot(position), read) is expected


@pytest.mark.parametrize("timeline", ["00000002", None])
def test_a_read_from_another_timeline_is_refused(scene: Scene, timeline: str | None) -> None:
    """A read from a standby, or from a server that was promoted or deposed since, is refused even
    at a known position."""
    began = scene.state.begin_read()
    assert scene.state.standing(snapshot(at(13), timeline), began) is Standing.REFUSED


def test_without_timelines_marks_tell_servers_apart(scene: Scene) -> None:
    """If the lease's server reports no timeline, a read without a timeline is judged by its
    mark."""
    scene.state.apply(log(at(13), server=Server(None, None)), scene.now)
    began = scene.state.begin_read()
    assert scene.state.standing(snapshot(at(13), None), began) is Standing.BELIEVED
    assert scene.state.standing(snapshot(at(13, 2), None), began) is Standing.REFUSED


def test_a_read_ahead_is_believed_once_the_log_has_its_position(scene: Scene) -> None:
    """A read ahead is refused if the log has its revision with another mark."""
    began = scene.state.begin_read()
    scene.apply((at(14), "c"))
    assert scene.state.standing(snapshot(at(14)), began) is Standing.BELIEVED
    assert scene.state.standing(snapshot(at(14, 2)), began) is Standing.REFUSED


@pytest.mark.parametrize("how", ["lost", "another timeline", "every token"])
def test_a_read_sent_before_the_cache_started_over_is_refused(scene: Scene, how: str) -> None:
    """Such a read was permitted by a lease on another history, even if its position is known
    again."""
    state = scene.state
    began = state.begin_read()
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
    assert state.standing(snapshot(position, server.timeline), began) is Standing.REFUSED
    again = state.begin_read()
    assert state.standing(snapshot(position, server.timeline), again) is Standing.BELIEVED


# The log.


def test_an_unknown_position_drops_everything(scene: Scene) -> None:
    """Cache, lease and registration are dropped at once, because their history may no longer
    exist."""
    state = scene.state
    epoch = state.epoch
    assert state.apply(Log(False, PRIMARY, at(20, 2), ()), scene.now)
    assert not state.registered
    assert state.lease_ends == -math.inf
    assert state.cache.position == NOWHERE
    assert len(state.cache) == 0
    assert state.epoch > epoch


@pytest.mark.parametrize("server", [PROMOTED, RESTORED, Server(None, None)])
def test_another_server_empties_the_cache(scene: Scene, server: Server) -> None:
    """Even on the same history, changes that are not in the log may be lost in a failover. The
    process stays registered, because its row was replicated."""
    state = scene.state
    epoch = state.epoch
    assert state.apply(log(at(14), (at(14), "c"), server=server), scene.now)
    assert state.registered
    assert state.server == server
    assert len(state.cache) == 0
    assert state.cache.position == at(14)
    assert state.epoch > epoch
    assert not state.apply(log(at(14), server=server), scene.now)


def test_an_incomplete_log_empties_the_cache(scene: Scene) -> None:
    """If a log names more tokens than a reader accepts, any token may have been named."""
    state = scene.state
    head, changes = at(90_000), (Change(at(14), ("c",)),)
    assert state.apply(Log(True, PRIMARY, head, changes, complete=False), scene.now)
    assert len(state.cache) == 0
    assert state.cache.position == head


def test_a_change_of_every_token_empties_the_cache(scene: Scene) -> None:
    """Changes that follow in the same log are applied as well."""
    state = scene.state
    changes = (Change(at(14), (EVERY_TOKEN,)), Change(at(15), ("c",)))
    assert state.apply(Log(True, PRIMARY, at(15), changes), scene.now)
    assert len(state.cache) == 0
    assert state.cache.position == at(15)
    assert state.cache.named_since(at(14)) == ["c"]


def test_only_an_applied_read_updates_its_time(scene: Scene) -> None:
    """Clients that claim to be ahead are judged by a log that was read after their claim."""
    state = scene.state
    scene.now += 1.0
    began = scene.now
    state.apply(log(at(13)), began)
    assert state.log_read_began == began
    scene.now += 1.0
    state.apply(Log(False, PRIMARY, at(13, 2), ()), scene.now)
    assert state.log_read_began == began


# Acknowledging.


def test_clients_of_a_lost_history_confirm_nothing_and_are_waited_for(scene: Scene) -> None:
    """Their confirmations are discarded. The end of their leases is not."""
    state = scene.state
    client = ClientLease("a client")
    ends = state.lease_ends
    state.client_leases.grant(client, 13, ends)
    assert state.acknowledgeable(scene.now) == 13
    state.lose()
    state.register(at(5, 2), 0, PROMOTED, 100.0)
    assert state.acknowledgeable(scene.now) == 0
    assert state.client_leases.floor(ends - 0.001) == 0
    assert state.acknowledgeable(ends) == 5


def test_a_lease_is_counted_from_before_the_statement(scene: Scene) -> None:
    """A lease is never shortened by a renewal that was sent earlier."""
    state = scene.state
    state.renew(scene.now + 1.0, 13)
    ends = state.lease_ends
    assert ends < scene.now + 1.0 + LEASE_SECONDS
    state.renew(scene.now, 13)
    assert state.lease_ends == ends


@pytest.mark.parametrize("mark", [1, 2**63 - 1, 2**63, 2**64 - 1, 0])
def test_marks_survive_the_sign_conversion(mark: int) -> None:
    """Postgres stores marks signed, the wire carries them unsigned: each mark survives the round
    trip."""
    assert -(2**63) <= mark_out(mark) < 2**63
    assert mark_in(mark_out(mark)) == mark


def test_no_deletion_is_confirmed_between_the_loss_of_a_history_and_its_end() -> None:
    """The process's row may be committed in the new history before the process knows that, and rows
    of other verifiers that still hold leases may be missing there."""
    scene = Scene(at(5))
    assert scene.state.rows_complete_at <= scene.now
    scene.state.lose()
    assert scene.state.rows_complete_at == math.inf
    scene.state.register(at(9), 9, PRIMARY, scene.now)
    assert scene.now + LEASE_SECONDS_MAX < scene.state.rows_complete_at < math.inf
