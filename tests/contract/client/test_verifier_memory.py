"""The client library's Verifier answering from memory, against a scripted Watch over real gRPC."""

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
from tests.support import WAIT_SECONDS, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.contract.client.conftest import FakeLatchkey

VALID = pb.VERDICT_VALID


@pytest.fixture
async def verifier(watched: FakeLatchkey) -> AsyncIterator[latchkey.Verifier]:
    """Verify with a scripted Latchkey that knows Watch, and says VALID until it says otherwise."""
    watched.on("Verify", watched.verdict(VALID))
    async with latchkey.Verifier(watched.target, timeout_seconds=WAIT_SECONDS) as connected:
        await watching(connected)
        yield connected


async def test_a_warm_verify_costs_no_call(
    verifier: latchkey.Verifier, watched: FakeLatchkey, secret: str
) -> None:
    """What the service said once is said again from memory, for every scope."""
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


async def test_what_is_no_secret_is_answered_without_a_lease(secret: str) -> None:
    """Shape and checksum need no service; everything else does, and nowait says so."""
    verifier = latchkey.Verifier("127.0.0.1:1")
    for presented in ("", "hunter2", "\ud800", secret[:-1] + "!"):
        answer = verifier.verify_nowait(presented)
        assert answer is not None
        assert answer.verdict is Verdict.MALFORMED
    assert verifier.verify_nowait(secret) is None
    await verifier.close()


@pytest.mark.parametrize("scope", [Scope.UNSPECIFIED, "read", 1])
async def test_a_wrong_scope_is_wrong_for_what_is_remembered(
    verifier: latchkey.Verifier, secret: str, scope: Any
) -> None:
    """A scope that is none raises, whatever the memory holds."""
    await verifier.verify(secret)
    for presented in (secret, "hunter2"):
        with pytest.raises((latchkey.InvalidArgument, TypeError)):
            verifier.verify_nowait(presented, scope)
        with pytest.raises((latchkey.InvalidArgument, TypeError)):
            await verifier.verify(presented, scope)


@pytest.mark.parametrize("verdict", ["UNKNOWN", "MALFORMED", "UNSPECIFIED"])
async def test_answers_without_a_token_are_forgotten(
    verifier: latchkey.Verifier, watched: FakeLatchkey, secret: str, verdict: str
) -> None:
    """A secret that was unknown a moment ago may have been created since."""
    watched.on("Verify", watched.verdict(pb.Verdict.Value(f"VERDICT_{verdict}"), token=False))
    for _ in range(2):
        assert (await verifier.verify(secret)).verdict is Verdict[verdict]
    assert watched.count("Verify") == 2
    assert verifier.stats().entries == 0


@pytest.mark.parametrize("verdict", ["DELETED", "EXPIRED"])
@pytest.mark.parametrize("expires", [None, -3600, 3600])
async def test_the_end_of_a_token_is_remembered_as_such(
    verifier: latchkey.Verifier,
    watched: FakeLatchkey,
    secret: str,
    verdict: str,
    expires: int | None,
) -> None:
    """DELETED and EXPIRED stay that for every scope, whatever this machine's clock says."""
    response = pb.VerifyResponse(
        verdict=pb.Verdict.Value(f"VERDICT_{verdict}"), revision=7, mark=mark_of(7)
    )
    response.token.CopyFrom(watched.token())
    if expires is not None:
        response.token.expire_time.FromDatetime(datetime.now(UTC) + timedelta(seconds=expires))
    watched.on("Verify", watched.says(response))
    await verifier.verify(secret)
    for scope in (None, Scope.READ, Scope.WRITE):
        answer = verifier.verify_nowait(secret, scope)
        assert answer is not None
        assert answer.verdict is Verdict[verdict]


async def test_expiry_is_judged_at_each_answer(
    verifier: latchkey.Verifier,
    watched: FakeLatchkey,
    secret: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is remembered of a token says nothing from its expire_time on: the service does."""
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
    monkeypatch.undo()  # set back, the clock of this machine makes it valid no more
    assert (await verifier.verify(secret)).verdict is Verdict.EXPIRED
    assert watched.count("Verify") == 2


async def test_an_answer_that_contradicts_itself_is_not_remembered(
    verifier: latchkey.Verifier, watched: FakeLatchkey, secret: str
) -> None:
    """When the service's verdict is not what the token's scope says, it is asked each time."""
    watched.on("Verify", watched.verdict(pb.VERDICT_INSUFFICIENT_SCOPE))
    assert not (await verifier.verify(secret, Scope.READ)).allowed
    token = watched.token()
    token.scope = 99  # type: ignore[assignment]  # of a newer server
    watched.on(
        "Verify",
        watched.says(pb.VerifyResponse(verdict=VALID, token=token, revision=7, mark=mark_of(7))),
    )
    assert (await verifier.verify(secret)).allowed
    assert verifier.stats().entries == 0


async def test_what_is_dropped_is_dropped_before_it_is_acknowledged(
    verifier: latchkey.Verifier, watched: FakeLatchkey, watch: FakeWatch, secret: str
) -> None:
    """When the service has the acknowledgement, no verify calls the token valid any more."""
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
    # That was read at revision 7, before the deletion as far as anybody can tell.
    assert verifier.verify_nowait(secret) is None
    assert verifier.stats().invalidations == 2


async def test_a_reset_empties_the_memory(
    verifier: latchkey.Verifier, watch: FakeWatch, secret: str
) -> None:
    """What the server cannot vouch for is gone, and so are answers that are still under way."""
    await verifier.verify(secret)
    watch.revision = 20
    await watch.streams[0].reset(20)
    await eventually(lambda: watch.streams[0].acknowledged == 20, "an acknowledgement")
    assert verifier.verify_nowait(secret) is None
    assert (await verifier.verify(secret)).allowed
    assert verifier.verify_nowait(secret) is None  # read at revision 7
    # The first one came when watching began.
    assert verifier.stats().resets == 2


async def test_without_a_lease_the_service_is_asked(
    verifier: latchkey.Verifier,
    watched: FakeLatchkey,
    watch: FakeWatch,
    secret: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When the lease is over, the memory says nothing and takes nothing in."""
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


@pytest.mark.parametrize("memory_entries", [0, 10])
async def test_an_old_server_is_asked_about_each(
    fake: FakeLatchkey, secret: str, memory_entries: int
) -> None:
    """Without Watch, or without a memory, verifies are plain calls, and stats() says why."""
    fake.on("Verify", fake.verdict(VALID))
    reason = "UNIMPLEMENTED" if memory_entries else "memory_entries"
    async with latchkey.Verifier(
        fake.target, timeout_seconds=WAIT_SECONDS, memory_entries=memory_entries
    ) as verifier:
        await eventually(lambda: reason in (verifier.stats().fallback_reason or ""), reason)
        for _ in range(3):
            assert (await verifier.verify(secret)).allowed
        stats = verifier.stats()
        assert (stats.watching, stats.entries, stats.hits, stats.misses) == (False, 0, 0, 3)
    assert fake.count("Verify") == 3


@pytest.mark.parametrize("status", ["FAILED_PRECONDITION", "PERMISSION_DENIED", "UNAVAILABLE"])
async def test_watch_is_tried_again(
    watched: FakeLatchkey,
    watch: FakeWatch,
    secret: str,
    status: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that refuses to be watched is asked again, in its own time, and then watched."""
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


async def test_refusals_are_not_asked_for_often(watched: FakeLatchkey, watch: FakeWatch) -> None:
    """A server without Watch gets a try a minute from each client, one that is away more."""
    assert _watch.UNSUPPORTED_RETRY_SECONDS >= 30
    assert _watch.RETRY_MAX_SECONDS >= 1
    watch.refuse = grpc.StatusCode.UNIMPLEMENTED
    async with latchkey.Verifier(watched.target, timeout_seconds=WAIT_SECONDS) as verifier:
        reason = "UNIMPLEMENTED"
        await eventually(lambda: reason in (verifier.stats().fallback_reason or ""), reason)
        tries = len(watch.streams)
        await asyncio.sleep(0.3)
        assert len(watch.streams) == tries


async def test_a_server_without_a_lease_is_listened_to(
    watched: FakeLatchkey, watch: FakeWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams that stay silent one after the other, as in an outage of the database, end in one
    that is kept; its grant, whenever it comes, brings the memory back at once."""
    # They are late when the test says so: each is to get here before.
    monkeypatch.setattr(_subscription, "FIRST_GRANT_SECONDS", 1_000.0)
    watch.granting = False
    async with latchkey.Verifier(watched.target, timeout_seconds=WAIT_SECONDS) as verifier:
        for number in range(1, _watch.SILENCES_MAX + 1):
            last = await watch.opened(number)
            await eventually(lambda: last.requests, "it asks")  # noqa: B023 - called at once
            newest = max(verifier._watcher._connections, key=lambda one: one.began)
            newest.stream.late_at = boottime()
            newest._news.set()
        await eventually(lambda: all(s.gone for s in watch.streams if s is not last), "they go")
        await asyncio.sleep(0.3)
        assert not last.gone
        assert len(watch.streams) == _watch.SILENCES_MAX
        watch.granting = True
        await last.grant(last.asked, watch.revision, watch.lease_seconds)
        await watching(verifier)
        assert len(watch.streams) == _watch.SILENCES_MAX


async def test_a_broken_stream_is_replaced_and_the_memory_kept(
    verifier: latchkey.Verifier, watched: FakeLatchkey, watch: FakeWatch, secret: str
) -> None:
    """Answers go on under the last grant; the new stream begins where the old one ended."""
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
    assert second.peer != watch.streams[0].peer  # a connection of its own, each time
    assert verifier.verify_nowait(secret) is not None
    assert watched.count("Verify") == 1


async def test_a_new_stream_shortens_the_lease(
    verifier: latchkey.Verifier, watch: FakeWatch
) -> None:
    """The server that is left does not wait for us: what it had granted is over."""
    watch.lease_seconds = 5.0
    watch.streams[0].end(grpc.StatusCode.UNAVAILABLE)
    await eventually(lambda: verifier.stats().reconnects == 1, "the new stream in use")
    assert verifier.stats().lease_remaining_seconds <= 5.0


@pytest.mark.usefixtures("patient_farewells")
async def test_a_server_that_stops_hands_its_clients_on(
    verifier: latchkey.Verifier,
    watched: FakeLatchkey,
    watch: FakeWatch,
    secret: str,
) -> None:
    """The memory answers throughout; the old server hears that it is released, after the new one
    has granted, and not before."""
    await verifier.verify(secret)
    first = watch.streams[0]
    watch.refuse = grpc.StatusCode.UNAVAILABLE  # new connections still reach the one that stops
    await first.closing()
    await watch.opened(3)
    assert verifier.verify_nowait(secret) is not None
    assert not first.released
    # It is still what Deletes wait for.
    await first.invalidate(9, "another")
    await eventually(lambda: first.acknowledged == 9, "an acknowledgement")
    watch.refuse, watch.revision = None, 9
    await eventually(lambda: first.released, "the release")
    await eventually(lambda: first.gone, "the end of the old stream")
    assert verifier.verify_nowait(secret) is not None
    stats = verifier.stats()
    assert (stats.reconnects, stats.fallback_reason, stats.watching) == (1, None, True)
    assert watched.count("Verify") == 1


async def test_grants_are_asked_for_before_the_lease_ends(
    watched: FakeLatchkey, watch: FakeWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In quiet times there is one stream, a lease without a gap, and few messages."""
    # Soon, with most of it left, so that a busy machine does not matter.
    monkeypatch.setattr(_subscription, "ASK_SHARE_MIN", 0.997)
    monkeypatch.setattr(_subscription, "ASK_SHARE_MAX", 0.997)
    async with latchkey.Verifier(watched.target, timeout_seconds=WAIT_SECONDS) as verifier:
        await watching(verifier)
        (stream,) = watch.streams
        while stream.asked < 5:
            assert verifier.stats().lease_remaining_seconds > 10
            await asyncio.sleep(0.005)
        # One message confirms the first position. It asks for nothing.
        numbers = [request.number for request in stream.requests]
        assert sorted(numbers) == [0, 1, 2, 3, 4, 5]
        assert len(watch.streams) == 1


@pytest.mark.usefixtures("patient_farewells")
async def test_a_silent_stream_is_left_for_another_while_the_lease_lasts(
    watched: FakeLatchkey, watch: FakeWatch, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A black-holed stream is noticed by the grant that does not come, and costs no verify."""
    # As above, and with little patience.
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


async def test_a_late_grant_on_the_old_stream_does_not_count(
    verifier: latchkey.Verifier, watch: FakeWatch
) -> None:
    """After a switch, one stream's grants extend the lease: the new one's."""
    first = watch.streams[0]
    watch.lease_seconds = 5.0
    first.end(grpc.StatusCode.UNAVAILABLE)
    await eventually(lambda: verifier.stats().reconnects == 1, "the new stream in use")
    second = watch.streams[1]
    await second.grant(99, 7, 50.0)  # of a number that was never asked for
    await second.invalidate(8, "x")
    await eventually(lambda: second.acknowledged == 8, "both arrived")
    assert verifier.stats().lease_remaining_seconds <= 5.0


async def test_a_blocked_stream_falls_back(
    watched: FakeLatchkey, watch: FakeWatch, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where streams are held up, verifies are plain calls, and tries become rare."""
    monkeypatch.setattr(_subscription, "FIRST_GRANT_SECONDS", 0.1)
    monkeypatch.setattr(_watch, "RETRY_FIRST_SECONDS", 0.01)
    watch.granting = False
    watched.on("Verify", watched.verdict(VALID))
    async with latchkey.Verifier(watched.target, timeout_seconds=WAIT_SECONDS) as verifier:
        await eventually(lambda: verifier.stats().fallback_reason, "a reason")
        assert "hold streams up" in (verifier.stats().fallback_reason or "")
        assert (await verifier.verify(secret)).allowed
        # Time for a dozen of tries; on a busy machine the first ones may not get here.
        await asyncio.sleep(1.2)
        assert len(watch.streams) <= _watch.SILENCES_MAX
        assert not verifier.stats().watching


@pytest.mark.usefixtures("patient_farewells")
async def test_closing_releases_the_lease(
    watched: FakeLatchkey, watch: FakeWatch, secret: str
) -> None:
    """A verifier that is closed answers no more from memory, and no Delete has to wait for it."""
    watched.on("Verify", watched.verdict(VALID))
    client = latchkey.Client(watched.target)
    verifier = latchkey.Verifier(client, timeout_seconds=WAIT_SECONDS)
    await verifier.verify(secret)  # watching begins with the first verify
    await watching(verifier)
    await verifier.verify(secret)
    assert verifier.verify_nowait(secret) is not None
    await verifier.close()
    await verifier.close()
    assert watch.streams[0].released
    assert verifier.verify_nowait(secret) is None
    assert "closed" in (verifier.stats().fallback_reason or "")
    # The client is not the verifier's: it still asks, and does not watch again.
    assert (await verifier.verify(secret)).allowed
    assert len(watch.streams) == 1
    await client.close()


async def test_closing_is_quick_when_nobody_listens(secret: str) -> None:
    """Close waits half a second for a server that is gone, and no longer."""
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


async def test_a_lent_channel_is_watched_on(
    watched: FakeLatchkey, watch: FakeWatch, secret: str
) -> None:
    """A client made with a channel watches there, and the channel's owner is who closes it."""
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


async def test_a_closed_client_is_not_watched_for(watched: FakeLatchkey, watch: FakeWatch) -> None:
    """When the client that lends its target is closed, no stream is opened any more."""
    client = latchkey.Client(watched.target)
    async with latchkey.Verifier(client) as verifier:
        await watching(verifier)
        await client.close()
        watch.streams[0].end(grpc.StatusCode.UNAVAILABLE)
        await eventually(lambda: verifier.stats().fallback_reason, "a reason")
        assert "closed" in (verifier.stats().fallback_reason or "")
        assert len(watch.streams) == 1


async def test_what_a_newer_server_says_is_no_reason_to_trust_the_memory(
    verifier: latchkey.Verifier, watch: FakeWatch, secret: str
) -> None:
    """An event that this version does not know empties the memory; watching goes on."""
    await verifier.verify(secret)
    await watch.streams[0].context.write(pb.WatchResponse.FromString(b"\x7a\x00"))  # field 15
    await eventually(lambda: verifier.verify_nowait(secret) is None, "an empty memory")
    assert verifier.stats().watching


def test_the_memory_has_a_size() -> None:
    """A negative bound is refused."""
    with pytest.raises(latchkey.InvalidArgument):
        latchkey.Verifier(memory_entries=-1)
