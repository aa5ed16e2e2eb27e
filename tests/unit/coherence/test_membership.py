"""A process as a verifier: which reads it believes, what it applies, what it acknowledges."""

import math

import pytest
from latchkey_coherence.lease import LEASE_SECONDS_MAX
from latchkey_coherence.memory import NOWHERE, Entry, Position
from latchkey_service.coherence.client_leases import SubLease
from latchkey_service.coherence.snapshot import Snapshot, mark_in, mark_out
from latchkey_service.coherence.verifier_state import (
    EVERY_TOKEN,
    Change,
    Log,
    ReadBegan,
    Server,
    Standing,
)

from tests.positions import at
from tests.unit.coherence.scene import LEASE_SECONDS, PRIMARY, Scene, log

PROMOTED = Server(PRIMARY.identifier, "00000002")
RESTORED = Server("7001", PRIMARY.timeline)


@pytest.fixture
def scene() -> Scene:
    """A process that began at revision 10, has applied 11 and 13, and remembers a token."""
    scene = Scene(at(10))
    scene.apply((at(11), "a"), (at(13), "b"))
    scene.renew()
    assert scene.membership.memory.admit(b"k", Entry("t", math.inf), at(13))
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
    """Known by its mark, and not from before what was applied when it was sent."""
    read = ReadBegan(began, scene.membership.epoch)
    assert scene.membership.standing(snapshot(position), read) is expected


@pytest.mark.parametrize("timeline", ["00000002", None])
def test_a_read_from_another_timeline_is_refused(scene: Scene, timeline: str | None) -> None:
    """Even at a known position: a standby, or a server that was promoted or deposed since."""
    began = scene.membership.begin_read()
    assert scene.membership.standing(snapshot(at(13), timeline), began) is Standing.REFUSED


def test_engines_without_timelines_are_told_apart_by_marks(scene: Scene) -> None:
    """None is as good a timeline as any other, where the lease's server has none either."""
    scene.membership.apply(log(at(13), server=Server(None, None)), scene.now)
    began = scene.membership.begin_read()
    assert scene.membership.standing(snapshot(at(13), None), began) is Standing.BELIEVED
    assert scene.membership.standing(snapshot(at(13, 2), None), began) is Standing.REFUSED


def test_a_read_ahead_is_believed_once_the_log_has_its_position(scene: Scene) -> None:
    """And refused when the log has the revision by another mark."""
    began = scene.membership.begin_read()
    scene.apply((at(14), "c"))
    assert scene.membership.standing(snapshot(at(14)), began) is Standing.BELIEVED
    assert scene.membership.standing(snapshot(at(14, 2)), began) is Standing.REFUSED


@pytest.mark.parametrize("how", ["lost", "another timeline", "every token"])
def test_a_read_that_was_sent_before_the_memory_started_over_is_refused(
    scene: Scene, how: str
) -> None:
    """It was permitted by a lease on another history, even where its position is known again."""
    membership = scene.membership
    began = membership.begin_read()
    server = PRIMARY
    if how == "lost":
        membership.lose()
        membership.register(at(13), 0, PRIMARY, 100.0)
    elif how == "another timeline":
        server = PROMOTED
        membership.apply(log(at(13), server=PROMOTED), scene.now)
    else:
        membership.apply(Log(True, PRIMARY, at(14), (Change(at(14), (EVERY_TOKEN,)),)), scene.now)
    scene.renew()
    position = membership.memory.position
    assert membership.standing(snapshot(position, server.timeline), began) is Standing.REFUSED
    again = membership.begin_read()
    assert membership.standing(snapshot(position, server.timeline), again) is Standing.BELIEVED


# The log.


def test_an_unknown_position_loses_everything(scene: Scene) -> None:
    """Memory, lease and registration go at once: they stood on a history that may be no more."""
    membership = scene.membership
    epoch = membership.epoch
    assert membership.apply(Log(False, PRIMARY, at(20, 2), ()), scene.now)
    assert not membership.registered
    assert membership.lease_ends == -math.inf
    assert membership.memory.position == NOWHERE
    assert len(membership.memory) == 0
    assert membership.epoch > epoch


@pytest.mark.parametrize("server", [PROMOTED, RESTORED, Server(None, None)])
def test_another_server_empties_the_memory(scene: Scene, server: Server) -> None:
    """Of the same history: what is not in the log may be lost with a failover. The process stays
    registered: its row was replicated."""
    membership = scene.membership
    epoch = membership.epoch
    assert membership.apply(log(at(14), (at(14), "c"), server=server), scene.now)
    assert membership.registered
    assert membership.server == server
    assert len(membership.memory) == 0
    assert membership.memory.position == at(14)
    assert membership.epoch > epoch
    assert not membership.apply(log(at(14), server=server), scene.now)


def test_too_long_a_log_empties_the_memory(scene: Scene) -> None:
    """More was named than a reader takes in, so that all of it may have been."""
    membership = scene.membership
    head, changes = at(90_000), (Change(at(14), ("c",)),)
    assert membership.apply(Log(True, PRIMARY, head, changes, complete=False), scene.now)
    assert len(membership.memory) == 0
    assert membership.memory.position == head


def test_a_change_of_every_token_empties_the_memory(scene: Scene) -> None:
    """And what comes after it in the same log is applied as well."""
    membership = scene.membership
    changes = (Change(at(14), (EVERY_TOKEN,)), Change(at(15), ("c",)))
    assert membership.apply(Log(True, PRIMARY, at(15), changes), scene.now)
    assert len(membership.memory) == 0
    assert membership.memory.position == at(15)
    assert membership.memory.named_since(at(14)) == ["c"]


def test_only_a_read_that_was_applied_counts_as_one(scene: Scene) -> None:
    """Clients that claim to be ahead are judged by a log that was read after they said so."""
    membership = scene.membership
    scene.now += 1.0
    began = scene.now
    membership.apply(log(at(13)), began)
    assert membership.log_read_began == began
    scene.now += 1.0
    membership.apply(Log(False, PRIMARY, at(13, 2), ()), scene.now)
    assert membership.log_read_began == began


# Acknowledging.


def test_clients_of_a_lost_history_confirm_nothing_and_are_waited_for(scene: Scene) -> None:
    """What they confirmed is forgotten. How long their leases run is not."""
    membership = scene.membership
    client = SubLease("a client")
    ends = membership.lease_ends
    membership.subleases.grant(client, 13, ends)
    assert membership.acknowledgeable(scene.now) == 13
    membership.lose()
    membership.register(at(5, 2), 0, PROMOTED, 100.0)
    assert membership.acknowledgeable(scene.now) == 0
    assert membership.subleases.floor(ends - 0.001) == 0
    assert membership.acknowledgeable(ends) == 5


def test_a_lease_is_counted_from_before_the_statement(scene: Scene) -> None:
    """And never shortened by one that was sent earlier."""
    membership = scene.membership
    membership.renew(scene.now + 1.0, 13)
    ends = membership.lease_ends
    assert ends < scene.now + 1.0 + LEASE_SECONDS
    membership.renew(scene.now, 13)
    assert membership.lease_ends == ends


@pytest.mark.parametrize("mark", [1, 2**63 - 1, 2**63, 2**64 - 1, 0])
def test_marks_cross_the_sign(mark: int) -> None:
    """Postgres has signed numbers, the wire has not: each mark comes back as it was."""
    assert -(2**63) <= mark_out(mark) < 2**63
    assert mark_in(mark_out(mark)) == mark


def test_no_deletion_is_confirmed_between_the_loss_of_a_history_and_its_end():
    """Its row may be committed in the new history before it knows that, and the rows of others
    that still hold leases may be missing there."""
    scene = Scene(at(5))
    assert scene.membership.settles_at <= scene.now
    scene.membership.lose()
    assert scene.membership.settles_at == math.inf
    scene.membership.register(at(9), 9, PRIMARY, scene.now)
    assert scene.now + LEASE_SECONDS_MAX < scene.membership.settles_at < math.inf
