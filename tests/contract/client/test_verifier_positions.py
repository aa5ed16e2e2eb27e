"""The Verifier when histories differ, with a scripted Watch over real gRPC."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import latchkey
import pytest
from latchkey_coherence.lease import boottime
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.contract.client.fake_watch import FakeStream, FakeWatch, mark_of, watching
from tests.helpers.waiting import WAIT_SECONDS, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.contract.client.conftest import FakeLatchkey

VALID = pb.VERDICT_VALID
# A position in another history: the same revision with another mark.
OTHER_MARK = mark_of(7) ^ 1


@pytest.fixture
async def verifier(watched: FakeLatchkey) -> AsyncIterator[latchkey.Verifier]:
    """Verify with a scripted Latchkey at revision 7 that says VALID by default."""
    watched.on("Verify", watched.verdict(VALID))
    async with latchkey.Verifier(watched.target, timeout_seconds=WAIT_SECONDS) as connected:
        await watching(connected)
        yield connected


def position_of(request: pb.WatchRequest) -> tuple[int, int]:
    return request.applied_revision, request.mark


async def confirmed(stream: FakeStream, revision: int, mark: int) -> None:
    """Wait until the client's latest message confirms this position."""
    await eventually(
        lambda: position_of(stream.requests[-1]) == (revision, mark), f"position {revision}"
    )


async def test_an_empty_client_knows_no_position(
    verifier: latchkey.Verifier, watch: FakeWatch
) -> None:
    """It starts with revision 0 and mark 0, and confirms the position that it is reset to."""
    (stream,) = watch.streams
    await confirmed(stream, 7, mark_of(7))
    first, *later = stream.requests
    assert (*position_of(first), first.number) == (0, 0, 1)
    assert {position_of(request) for request in later} == {(7, mark_of(7))}
    await stream.invalidate(8, "t2")
    await confirmed(stream, 8, mark_of(8))
    assert verifier.stats().watching


async def test_a_grant_for_another_history_is_ignored(
    watched: FakeLatchkey, watch: FakeWatch, secret: str
) -> None:
    """A grant permits nothing if the client does not know its position, mark included."""
    watch.granting = False
    watched.on("Verify", watched.verdict(VALID))
    async with latchkey.Verifier(watched.target, timeout_seconds=WAIT_SECONDS) as verifier:
        stream = await watch.opened(1)
        await confirmed(stream, 7, mark_of(7))
        for revision, mark in ((7, OTHER_MARK), (7, 0), (8, mark_of(8)), (6, mark_of(6))):
            await stream.grant(stream.asked, revision, 30.0, mark)
        await stream.invalidate(9, "t2")
        await confirmed(stream, 9, mark_of(9))
        assert not verifier.stats().watching
        await verifier.verify(secret)
        assert verifier.stats().entries == 0
        await stream.grant(stream.asked, 9, 30.0)
        await watching(verifier)


async def test_a_server_without_marks_permits_nothing(
    watched: FakeLatchkey, watch: FakeWatch, secret: str
) -> None:
    """The client cannot distinguish histories there, so it asks the service about each secret."""
    watch.granting = False
    message = pb.VerifyResponse(verdict=VALID, token=watched.token(), revision=8)
    watched.on("Verify", watched.says(message))
    async with latchkey.Verifier(watched.target, timeout_seconds=WAIT_SECONDS) as verifier:
        stream = await watch.opened(1)
        await stream.reset(7, mark=0)
        await stream.grant(stream.asked, 7, 30.0, mark=0)
        await stream.invalidate(8, "t2", mark=0)
        await eventually(lambda: stream.acknowledged == 8, "an acknowledgement")
        await stream.grant(stream.asked, 8, 30.0, mark=0)
        await stream.invalidate(9, "t2", mark=0)
        await eventually(lambda: stream.acknowledged == 9, "all arrived")
        assert not verifier.stats().watching
        for _ in range(2):
            assert (await verifier.verify(secret)).allowed
        assert watched.count("Verify") == 2


async def test_a_known_revision_with_another_mark_ends_everything(
    verifier: latchkey.Verifier, watch: FakeWatch, secret: str
) -> None:
    """The server follows another history. The client drops its entries and its lease at once, and
    reports that it knows no position."""
    await verifier.verify(secret)
    watch.granting = False
    (stream,) = watch.streams
    await stream.invalidate(7, "t2", mark=OTHER_MARK)
    await confirmed(stream, 0, 0)
    stats = verifier.stats()
    assert (stats.watching, stats.entries, stats.applied_revision) == (False, 0, 0)
    # The server answers with a reset to its own history, and may then grant again.
    await stream.reset(7, OTHER_MARK)
    await confirmed(stream, 7, OTHER_MARK)
    await stream.grant(stream.asked, 7, 30.0, mark_of(7))
    await stream.grant(stream.asked, 7, 30.0, OTHER_MARK)
    await watching(verifier)


async def test_a_reset_may_lead_back(
    verifier: latchkey.Verifier, watched: FakeLatchkey, watch: FakeWatch, secret: str
) -> None:
    """After a failover the head may be lower. The client empties its cache, loses its lease, and
    confirms the lower revision. It keeps no answer from the history that it left."""
    await verifier.verify(secret)
    watch.granting = False
    (stream,) = watch.streams
    await stream.reset(3)
    await confirmed(stream, 3, mark_of(3))
    stats = verifier.stats()
    assert (stats.watching, stats.entries, stats.applied_revision) == (False, 0, 3)
    await stream.grant(stream.asked, 3, 30.0)
    await watching(verifier)
    assert (await verifier.verify(secret)).allowed
    # That answer was read at revision 7 of the old history.
    assert verifier.stats().entries == 0
    response = pb.VerifyResponse(verdict=VALID, token=watched.token(), revision=3, mark=mark_of(3))
    watched.on("Verify", watched.says(response))
    await verifier.verify(secret)
    assert verifier.stats().entries == 1


@pytest.mark.parametrize(
    ("revision", "mark", "kept"),
    [
        (9, mark_of(9), True),
        (8, mark_of(8), True),
        (7, mark_of(7), False),
        (9, OTHER_MARK, False),
        (8, mark_of(9), False),
        (9, 0, False),
        (10, mark_of(10), False),
        (0, 0, False),
    ],
    ids=["level", "known", "named since", "other", "mixed", "no mark", "ahead", "nothing read"],
)
async def test_an_answer_is_cached_if_its_position_is_known(
    verifier: latchkey.Verifier,
    watched: FakeLatchkey,
    watch: FakeWatch,
    secret: str,
    revision: int,
    mark: int,
    kept: bool,
) -> None:
    """The client only caches an answer if its position is in the client's own history and no later
    revision there names the token."""
    (stream,) = watch.streams
    await stream.invalidate(8, "t1")
    await stream.invalidate(9, "another")
    await confirmed(stream, 9, mark_of(9))
    response = pb.VerifyResponse(verdict=VALID, token=watched.token(), revision=revision, mark=mark)
    watched.on("Verify", watched.says(response))
    answer = await verifier.verify(secret)
    assert (answer.revision, answer.mark) == (revision, mark)
    assert verifier.stats().entries == kept


async def test_a_reset_on_a_new_stream_ends_the_old_one(
    verifier: latchkey.Verifier, watch: FakeWatch, secret: str
) -> None:
    """The old stream's server assumes the client's old position, so it might not name all tokens to
    evict. Its invalidations and grants no longer count."""
    await verifier.verify(secret)
    first = watch.streams[0]
    watch.granting = False
    await first.closing()
    second = await watch.opened(2)
    await second.reset(7, OTHER_MARK)
    await confirmed(second, 7, OTHER_MARK)
    # A grant for the client's current position, from the server that does not know that position.
    await first.grant(first.asked, 7, 30.0, OTHER_MARK)
    # On its next message the client also notices that it has left, and holds no lease there.
    await eventually(lambda: first.released, "the first stream is released")
    assert not verifier.stats().watching
    await second.grant(second.asked, 7, 20.0, OTHER_MARK)
    await watching(verifier)
    assert verifier.stats().lease_remaining_seconds <= 20.0


async def test_cached_answers_are_read_again(
    watched: FakeLatchkey, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even with an unbroken lease, an answer is read again after at most `memory_seconds`."""
    watched.on("Verify", watched.verdict(VALID), watched.verdict(pb.VERDICT_DELETED))
    async with latchkey.Verifier(
        watched.target, timeout_seconds=WAIT_SECONDS, memory_seconds=10.0
    ) as verifier:
        await watching(verifier)
        before = boottime()
        assert (await verifier.verify(secret)).allowed
        after = boottime()
        monkeypatch.setattr("latchkey.verifier.boottime", lambda: before + 4.9)
        assert verifier.verify_nowait(secret) is not None
        monkeypatch.setattr("latchkey.verifier.boottime", lambda: after + 10.0)
        assert verifier.verify_nowait(secret) is None
        assert not (await verifier.verify(secret)).allowed
    assert watched.count("Verify") == 2


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_the_cache_time_is_positive(seconds: float) -> None:
    """A time that would never, or always, be over is rejected."""
    with pytest.raises(latchkey.InvalidArgument):
        latchkey.Verifier(memory_seconds=seconds)


async def test_a_broken_stream_resumes_at_its_position(
    verifier: latchkey.Verifier, watch: FakeWatch
) -> None:
    """The next stream starts with the whole position, so that its server can compare the mark."""
    watch.revision = 8
    await watch.streams[0].invalidate(8, "t2")
    await confirmed(watch.streams[0], 8, mark_of(8))
    watch.streams[0].end(grpc.StatusCode.UNAVAILABLE)
    second = await watch.opened(2)
    await eventually(lambda: second.requests, "its first message")
    assert position_of(second.requests[0]) == (8, mark_of(8))
    await watching(verifier)
