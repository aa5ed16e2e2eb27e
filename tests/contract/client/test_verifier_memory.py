"""The Verifier's cache with a scripted Watch over real gRPC: what the loop around the core does.

`tests/conformance` plays the core's decisions, which need no connection.
"""

from __future__ import annotations

import asyncio
import socket
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import grpc
import latchkey
import pytest
from latchkey import Scope, Verdict, _subscription, _watch
from latchkey_coherence.lease import boottime
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.contract.client.fake_watch import FakeWatch, mark_of, watching
from tests.helpers.waiting import WAIT_SECONDS, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.contract.client.conftest import FakeLatchkey

VALID = pb.VERDICT_VALID


@pytest.fixture
async def verifier(watched: FakeLatchkey) -> AsyncIterator[latchkey.Verifier]:
    """Verify with a scripted Latchkey that supports Watch and says VALID by default."""
    watched.on("Verify", watched.verdict(VALID))
    async with latchkey.Verifier(watched.target, timeout_seconds=WAIT_SECONDS) as connected:
        await watching(connected)
        yield connected


async def test_a_warm_verify_costs_no_call(
    verifier: latchkey.Verifier, watched: FakeLatchkey, secret: str
) -> None:
    """A cached answer is returned for every scope, without a call."""
    assert verifier.verify_nowait(secret) is None
    first = await verifier.verify(secret, Scope.READ)
    assert await verifier.verify(latchkey.Secret(secret)) is first
    assert verifier.verify_nowait(secret, Scope.READ) is first
    refused = verifier.verify_nowait(secret, Scope.WRITE)
    assert refused is not None
    assert refused.verdict is Verdict.INSUFFICIENT_SCOPE
    assert refused.token == first.token
    assert watched.count("Verify") == 1
    stats = verifier.stats()
    assert (stats.hits, stats.misses, stats.entries, stats.fallback_reason) == (3, 1, 1, None)
    assert stats.applied_revision == 7
    assert 20 < stats.lease_remaining_seconds <= 30


async def test_malformed_secrets_are_answered_without_a_lease(secret: str) -> None:
    """Format and checksum need no service. For everything else verify_nowait returns None."""
    verifier = latchkey.Verifier("127.0.0.1:1")
    for presented in ("", "hunter2", "\ud800", secret[:-1] + "!"):
        answer = verifier.verify_nowait(presented)
        assert answer is not None
        assert answer.verdict is Verdict.MALFORMED
    assert verifier.verify_nowait(secret) is None
    await verifier.close()


@pytest.mark.parametrize("scope", [Scope.UNSPECIFIED, "read", 1])
async def test_an_invalid_scope_is_an_error_for_cached_answers(
    verifier: latchkey.Verifier, secret: str, scope: Any
) -> None:
    """An invalid scope raises, whatever the cache holds."""
    await verifier.verify(secret)
    for presented in (secret, "hunter2"):
        with pytest.raises((latchkey.InvalidArgument, TypeError)):
            verifier.verify_nowait(presented, scope)
        with pytest.raises((latchkey.InvalidArgument, TypeError)):
            await verifier.verify(presented, scope)


async def test_expiry_is_judged_at_each_answer(
    verifier: latchkey.Verifier,
    watched: FakeLatchkey,
    secret: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a token's expire_time its cached answer is not used, and the service is asked."""
    expires = datetime.now(UTC) + timedelta(hours=1)
    token = watched.token()
    token.expire_time.FromDatetime(expires)
    watched.on(
        "Verify",
        watched.says(pb.VerifyResponse(verdict=VALID, token=token, revision=7, mark=mark_of(7))),
        watched.says(
            pb.VerifyResponse(verdict=pb.VERDICT_EXPIRED, token=token, revision=7, mark=mark_of(7))
        ),
    )
    assert (await verifier.verify(secret)).allowed
    monkeypatch.setattr("latchkey.verifier._wall_clock", lambda: expires.timestamp() - 0.001)
    assert (await verifier.verify(secret)).allowed
    monkeypatch.setattr("latchkey.verifier._wall_clock", expires.timestamp)
    assert verifier.verify_nowait(secret) is None
    assert (await verifier.verify(secret)).verdict is Verdict.EXPIRED
    monkeypatch.undo()  # a clock that is set back does not make the token valid again
    assert (await verifier.verify(secret)).verdict is Verdict.EXPIRED
    assert watched.count("Verify") == 2


async def test_a_contradictory_answer_is_not_cached(
    verifier: latchkey.Verifier, watched: FakeLatchkey, secret: str
) -> None:
    """If the verdict does not match the token's scope, the service is asked each time."""
    watched.on("Verify", watched.verdict(pb.VERDICT_INSUFFICIENT_SCOPE))
    assert not (await verifier.verify(secret, Scope.READ)).allowed
    token = watched.token()
    token.scope = 99  # type: ignore[assignment]  # from a newer server
    watched.on(
        "Verify",
        watched.says(pb.VerifyResponse(verdict=VALID, token=token, revision=7, mark=mark_of(7))),
    )
    assert (await verifier.verify(secret)).allowed
    assert verifier.stats().entries == 0


async def test_a_token_is_evicted_before_the_acknowledgement(
    verifier: latchkey.Verifier, watched: FakeLatchkey, watch: FakeWatch, secret: str
) -> None:
    """Once the service has the acknowledgement, no verify calls the token valid any more."""
    await verifier.verify(secret)
    watched.on("Verify", watched.verdict(pb.VERDICT_DELETED))
    stream = watch.streams[0]
    await stream.invalidate(8, "another")
    await eventually(lambda: stream.acknowledged == 8, "an acknowledgement")
    assert verifier.verify_nowait(secret) is not None
    await stream.invalidate(9, "t1", "another")
    await eventually(lambda: stream.acknowledged == 9, "an acknowledgement")
    assert verifier.verify_nowait(secret) is None
    assert (await verifier.verify(secret)).verdict is Verdict.DELETED
    # That answer was read at revision 7, so perhaps before the deletion.
    assert verifier.verify_nowait(secret) is None
    assert verifier.stats().invalidations == 2


async def test_another_history_ends_everything(
    verifier: latchkey.Verifier, watch: FakeWatch, secret: str
) -> None:
    """A known revision with another mark belongs to another history. The client drops its entries
    and its lease at once, and reports that it knows no position. Only the server's own history
    counts again."""
    other = mark_of(7) ^ 1

    def confirmed(revision: int, mark: int) -> bool:
        request = stream.requests[-1]
        return (request.applied_revision, request.mark) == (revision, mark)

    await verifier.verify(secret)
    watch.granting = False
    (stream,) = watch.streams
    await stream.invalidate(7, "t2", mark=other)
    await eventually(lambda: confirmed(0, 0), "no position")
    stats = verifier.stats()
    assert (stats.watching, stats.entries, stats.applied_revision) == (False, 0, 0)
    await stream.reset(7, other)
    await eventually(lambda: confirmed(7, other), "the other history")
    await stream.grant(stream.asked, 7, 30.0, mark_of(7))
    await stream.grant(stream.asked, 7, 30.0, other)
    await watching(verifier)


async def test_without_a_lease_the_service_is_asked(
    verifier: latchkey.Verifier,
    watched: FakeLatchkey,
    watch: FakeWatch,
    secret: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After the lease has ended, no cached answer is given and none is stored."""
    await verifier.verify(secret)
    ends = verifier._lease.end
    monkeypatch.setattr("latchkey.verifier.boottime", lambda: ends - 0.01)
    assert verifier.verify_nowait(secret) is not None
    monkeypatch.setattr("latchkey.verifier.boottime", lambda: ends + 0.01)
    assert verifier.verify_nowait(secret) is None
    assert (await verifier.verify(secret)).allowed
    assert watched.count("Verify") == 2
    assert not verifier.stats().watching
    assert len(watch.streams) == 1


@pytest.mark.parametrize("cache_entries", [0, 10])
async def test_an_old_server_is_asked_each_time(
    fake: FakeLatchkey, secret: str, cache_entries: int
) -> None:
    """Without Watch, or with the cache off, verifies are plain calls, and stats() says why."""
    fake.on("Verify", fake.verdict(VALID))
    reason = "UNIMPLEMENTED" if cache_entries else "cache_entries"
    async with latchkey.Verifier(
        fake.target, timeout_seconds=WAIT_SECONDS, cache_entries=cache_entries
    ) as verifier:
        await eventually(lambda: reason in (verifier.stats().fallback_reason or ""), reason)
        for _ in range(3):
            assert (await verifier.verify(secret)).allowed
        stats = verifier.stats()
        assert (stats.watching, stats.entries, stats.hits, stats.misses) == (False, 0, 0, 3)
    assert fake.count("Verify") == 3


@pytest.mark.parametrize("status", ["FAILED_PRECONDITION", "PERMISSION_DENIED", "UNAVAILABLE"])
async def test_watch_is_retried(
    watched: FakeLatchkey,
    watch: FakeWatch,
    secret: str,
    status: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that refuses Watch is asked again after a while, and then watched."""
    monkeypatch.setattr(_watch, "UNSUPPORTED_RETRY_SECONDS", 0.1)
    watch.refuse = grpc.StatusCode[status]
    watched.on("Verify", watched.verdict(VALID))
    async with latchkey.Verifier(watched.target, timeout_seconds=WAIT_SECONDS) as verifier:
        await watch.opened(2)
        assert (await verifier.verify(secret)).allowed
        # A refusal can overtake the first message, and then gRPC loses the status.
        await eventually(lambda: status in (verifier.stats().fallback_reason or ""), "the status")
        watch.refuse = None
        await watching(verifier)
        assert verifier.stats().fallback_reason is None


async def test_a_silent_stream_is_kept_after_several_attempts(
    watched: FakeLatchkey, watch: FakeWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If several streams stay silent, as during a database outage, the client keeps the last one.
    Its grant, whenever it arrives, makes cached answers possible at once."""
    # The test decides when they are late, so that each stream arrives here before that.
    monkeypatch.setattr(_subscription, "FIRST_GRANT_SECONDS", 1_000.0)
    watch.granting = False
    async with latchkey.Verifier(watched.target, timeout_seconds=WAIT_SECONDS) as verifier:
        for number in range(1, _watch.SILENCES_MAX + 1):
            last = await watch.opened(number)
            await eventually(lambda: last.requests, "a request")  # noqa: B023 - called at once
            newest = max(verifier._watcher._connections, key=lambda one: one.began)
            newest.stream.late_at = boottime()
            newest._changed.set()
        await eventually(lambda: all(s.gone for s in watch.streams if s is not last), "they go")
        await asyncio.sleep(0.3)
        assert not last.gone
        assert len(watch.streams) == _watch.SILENCES_MAX
        watch.granting = True
        await last.grant(last.asked, watch.revision, watch.lease_seconds)
        await watching(verifier)
        assert len(watch.streams) == _watch.SILENCES_MAX


async def test_a_broken_stream_is_replaced_and_the_cache_kept(
    verifier: latchkey.Verifier, watched: FakeLatchkey, watch: FakeWatch, secret: str
) -> None:
    """The last grant stays valid. The new stream starts at the old one's position."""
    await verifier.verify(secret)
    await watch.streams[0].invalidate(9, "another")
    await eventually(lambda: watch.streams[0].acknowledged == 9, "an acknowledgement")
    watch.revision = 9
    watch.streams[0].end(grpc.StatusCode.UNAVAILABLE)
    await eventually(lambda: watch.streams[0].gone, "the end of the stream")
    assert verifier.verify_nowait(secret) is not None
    second = await watch.opened(2)
    await eventually(lambda: verifier.stats().reconnects == 1, "the new stream in use")
    first_request = second.requests[0]
    assert (first_request.applied_revision, first_request.number) == (9, 1)
    assert second.peer != watch.streams[0].peer  # each stream has its own connection
    assert verifier.verify_nowait(secret) is not None
    assert watched.count("Verify") == 1


@pytest.mark.usefixtures("patient_releases")
async def test_a_stopping_server_hands_over_its_clients(
    verifier: latchkey.Verifier,
    watched: FakeLatchkey,
    watch: FakeWatch,
    secret: str,
) -> None:
    """Cached answers continue throughout. The old server receives the release only after
    the new one has granted."""
    await verifier.verify(secret)
    first = watch.streams[0]
    watch.refuse = grpc.StatusCode.UNAVAILABLE  # new connections still reach the stopping server
    await first.closing()
    await watch.opened(3)
    assert verifier.verify_nowait(secret) is not None
    assert not first.released
    # Deletes still wait for its lease.
    await first.invalidate(9, "another")
    await eventually(lambda: first.acknowledged == 9, "an acknowledgement")
    watch.refuse, watch.revision = None, 9
    await eventually(lambda: first.released, "the release")
    await eventually(lambda: first.gone, "the end of the old stream")
    assert verifier.verify_nowait(secret) is not None
    stats = verifier.stats()
    assert (stats.reconnects, stats.fallback_reason, stats.watching) == (1, None, True)
    assert watched.count("Verify") == 1


async def test_grants_are_requested_before_the_lease_ends(
    watched: FakeLatchkey, watch: FakeWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without changes there is one stream, a lease without gaps, and few messages."""
    # Ask early, with most of the lease left, so that a busy machine does not matter.
    monkeypatch.setattr(_subscription, "ASK_SHARE_MIN", 0.997)
    monkeypatch.setattr(_subscription, "ASK_SHARE_MAX", 0.997)
    async with latchkey.Verifier(watched.target, timeout_seconds=WAIT_SECONDS) as verifier:
        await watching(verifier)
        (stream,) = watch.streams
        while stream.asked < 5:
            assert verifier.stats().lease_remaining_seconds > 10
            await asyncio.sleep(0.005)
        # One message confirms the first position without requesting a grant.
        numbers = [request.number for request in stream.requests]
        assert sorted(numbers) == [0, 1, 2, 3, 4, 5]
        assert len(watch.streams) == 1


@pytest.mark.usefixtures("patient_releases")
async def test_a_silent_stream_is_replaced_while_the_lease_lasts(
    watched: FakeLatchkey, watch: FakeWatch, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing grant reveals a black-holed stream, and no verify needs a call because of it."""
    # As above, and with a short wait for a late grant.
    monkeypatch.setattr(_subscription, "ASK_SHARE_MIN", 0.997)
    monkeypatch.setattr(_subscription, "ASK_SHARE_MAX", 0.997)
    monkeypatch.setattr(_subscription, "LATE_SHARE", 0.99)
    watched.on("Verify", watched.verdict(VALID))
    async with latchkey.Verifier(watched.target, timeout_seconds=WAIT_SECONDS) as verifier:
        await watching(verifier)
        await verifier.verify(secret)
        first = watch.streams[0]

        first.silent = True
        await watch.opened(2)
        assert verifier.stats().watching
        await eventually(lambda: verifier.stats().reconnects == 1, "the new stream in use")
        assert verifier.stats().watching
        assert verifier.verify_nowait(secret) is not None
        await eventually(lambda: first.released and first.gone, "the end of the silent stream")
    assert watched.count("Verify") == 1


async def test_buffered_streams_fall_back_to_calls(
    watched: FakeLatchkey, watch: FakeWatch, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a proxy buffers streams, verifies are plain calls, and new attempts become rare."""
    monkeypatch.setattr(_subscription, "FIRST_GRANT_SECONDS", 0.1)
    monkeypatch.setattr(_watch, "RETRY_FIRST_SECONDS", 0.01)
    watch.granting = False
    watched.on("Verify", watched.verdict(VALID))
    async with latchkey.Verifier(watched.target, timeout_seconds=WAIT_SECONDS) as verifier:
        await eventually(lambda: verifier.stats().fallback_reason, "a reason")
        assert "buffering streams" in (verifier.stats().fallback_reason or "")
        assert (await verifier.verify(secret)).allowed
        # Time for a dozen attempts. On a busy machine the first ones may not arrive.
        await asyncio.sleep(1.2)
        assert len(watch.streams) <= _watch.SILENCES_MAX
        assert not verifier.stats().watching


@pytest.mark.usefixtures("patient_releases")
async def test_closing_releases_the_lease(
    watched: FakeLatchkey, watch: FakeWatch, secret: str
) -> None:
    """A closed verifier gives no cached answers, and no Delete has to wait for it."""
    watched.on("Verify", watched.verdict(VALID))
    client = latchkey.Client(watched.target)
    verifier = latchkey.Verifier(client, timeout_seconds=WAIT_SECONDS)
    await verifier.verify(secret)  # the first verify starts watching
    await watching(verifier)
    await verifier.verify(secret)
    assert verifier.verify_nowait(secret) is not None
    await verifier.close()
    await verifier.close()
    assert watch.streams[0].released
    assert verifier.verify_nowait(secret) is None
    assert "closed" in (verifier.stats().fallback_reason or "")
    # The client was passed in, so the verifier can still ask, but does not watch again.
    assert (await verifier.verify(secret)).allowed
    assert len(watch.streams) == 1
    await client.close()


async def test_closing_is_quick_without_a_server(secret: str) -> None:
    """close() waits at most half a second for a server that is gone."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        target = f"127.0.0.1:{held.getsockname()[1]}"
        verifier = latchkey.Verifier(target, timeout_seconds=0.1)
        with pytest.raises(latchkey.Unavailable):
            await verifier.verify(secret)
        started = boottime()
        await verifier.close()
        assert boottime() - started < 2


async def test_a_supplied_channel_is_used_for_watching(
    watched: FakeLatchkey, watch: FakeWatch, secret: str
) -> None:
    """A client with its own channel watches on that channel, and its owner closes it."""
    watched.on("Verify", watched.verdict(VALID))
    async with grpc.aio.insecure_channel(watched.target) as channel:
        client = latchkey.Client(channel=channel)
        verifier = latchkey.Verifier(client, timeout_seconds=WAIT_SECONDS)
        await verifier.verify(secret)
        await watching(verifier)
        await verifier.close()
        await eventually(lambda: watch.streams[0].gone, "the end of the first stream")
        client = latchkey.Client(channel=channel)
        again = latchkey.Verifier(client, timeout_seconds=WAIT_SECONDS)
        assert (await again.verify(secret)).allowed
        await watching(again)
    await again.close()
    await eventually(lambda: watch.streams[1].gone, "the end of the stream")


async def test_a_closed_client_opens_no_streams(watched: FakeLatchkey, watch: FakeWatch) -> None:
    """After the client is closed, its verifier opens no further stream."""
    client = latchkey.Client(watched.target)
    async with latchkey.Verifier(client) as verifier:
        await watching(verifier)
        await client.close()
        watch.streams[0].end(grpc.StatusCode.UNAVAILABLE)
        await eventually(lambda: verifier.stats().fallback_reason, "a reason")
        assert "closed" in (verifier.stats().fallback_reason or "")
        assert len(watch.streams) == 1
