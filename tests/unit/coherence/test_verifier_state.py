"""A process as a verifier: the changes that it applies and acknowledges.

These tests state the server's side of rule 12, which random schedules of `tests/simulation` reach
too rarely.
"""

import math

import pytest
from latchkey_coherence.lease import LEASE_SECONDS_MAX
from latchkey_coherence.verdict_cache import NOWHERE
from latchkey_service.coherence.client_leases import ClientLease
from latchkey_service.coherence.snapshot import mark_in, mark_out
from latchkey_service.coherence.verifier_state import (
    EVERY_TOKEN,
    Change,
    Log,
    Server,
)

from tests.helpers.positions import at
from tests.unit.coherence.scene import LEASE_SECONDS, PRIMARY, Scene, caught_up, log

PROMOTED = Server(PRIMARY.identifier, "00000002")
RESTORED = Server("7001", PRIMARY.timeline)


@pytest.fixture
def scene() -> Scene:
    """A process that has applied 11 and 13, and has a token in its cache."""
    return caught_up()


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
