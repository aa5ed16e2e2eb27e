"""When a token was last used, by whom, and how often: over both transports."""

from __future__ import annotations

import asyncio
import contextlib
import time
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import grpc
import latchkey
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from latchkey import Scope, Verdict, _uses
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.tokens import usage_writer
from latchkey_service.tokens.usage_writer import UsageWriter

from tests.contract.client.fake_watch import watching as has_lease
from tests.helpers.callers import credential, policy_text
from tests.helpers.calls import CHANNEL_OPTIONS
from tests.helpers.servers import serving
from tests.helpers.waiting import eventually
from tests.helpers.watch_client import WatchClient, watching

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from latchkey_proto.v1.token_service_pb2_grpc import TokenServiceAsyncStub
    from latchkey_service.settings.settings import Settings

    from tests.helpers.servers import Create

READ, WRITE = pb.SCOPE_READ, pb.SCOPE_WRITE
ACCOUNT = "acme"


@pytest.fixture(autouse=True)
def written_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers write after a fraction of the usual time."""
    monkeypatch.setattr(usage_writer, "WRITE_SECONDS", 0.05)


async def usage_of(stub: Any, token: pb.Token) -> dict[str, int]:
    """Return the number of uses by caller."""
    request = pb.GetUsageRequest(account_id=token.account_id, id=token.id)
    answer = await stub.GetUsage(request, timeout=5)
    return {usage.caller: sum(day.count for day in usage.days) for usage in answer.callers}


async def used(stub: Any, token: pb.Token, expected: dict[str, int]) -> None:
    """Wait until the uses of a token are as expected. Counts only increase, so they are exact."""

    async def as_expected() -> bool:
        found = await usage_of(stub, token)
        assert found == expected
        return True

    await eventually(as_expected, f"{expected}")


def now() -> datetime:
    return datetime.now(UTC)


async def test_uses_on_a_server(stub: TokenServiceAsyncStub, create: Create) -> None:
    """Get, List and GetUsage show the verifies that a server answered VALID, and no others."""
    created, unused = await create(), await create()
    before = now()
    assert not created.token.HasField("last_used_time")
    request = pb.VerifyRequest(secret=created.secret, required_scope=READ)
    denied = pb.VerifyRequest(secret=created.secret, required_scope=WRITE)
    for _ in range(3):
        answer = await stub.Verify(request, timeout=5)
        assert answer.verdict == pb.VERDICT_VALID
        assert not answer.token.HasField("last_used_time")
    await stub.BatchVerify(pb.BatchVerifyRequest(requests=[request, denied, request]), timeout=5)
    assert (await stub.Verify(denied, timeout=5)).verdict == pb.VERDICT_INSUFFICIENT_SCOPE
    after = now()
    await used(stub, created.token, {"": 5})
    usage = await stub.GetUsage(
        pb.GetUsageRequest(account_id=ACCOUNT, id=created.token.id), timeout=5
    )
    (caller,) = usage.callers
    first = caller.first_used_time.ToDatetime(UTC)
    last = caller.last_used_time.ToDatetime(UTC)
    assert before <= first <= last <= after
    (day,) = caller.days
    assert day.start_time.ToDatetime(UTC) in {start_of(before), start_of(after)}
    got = await stub.Get(pb.GetRequest(account_id=ACCOUNT, id=created.token.id), timeout=5)
    listed = await stub.List(pb.ListRequest(account_id=ACCOUNT), timeout=5)
    by_id = {token.id: token for token in listed.tokens}
    assert by_id[created.token.id] == got.token
    assert got.token.last_used_time == caller.last_used_time
    assert not by_id[unused.token.id].HasField("last_used_time")
    assert await usage_of(stub, unused.token) == {}


def start_of(moment: datetime) -> datetime:
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)


async def test_usage_belongs_to_the_account(stub: TokenServiceAsyncStub, create: Create) -> None:
    """GetUsage finds only live tokens of the account that is named."""
    created = await create()
    for account_id, token_id in (("globex", created.token.id), (ACCOUNT, "tok_none")):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.GetUsage(pb.GetUsageRequest(account_id=account_id, id=token_id), timeout=5)
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
    delete = pb.DeleteRequest(account_id=ACCOUNT, id=created.token.id)
    await stub.Delete(delete, timeout=8)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await usage_of(stub, created.token)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND


async def test_uses_through_the_library_and_on_the_server_add_up(
    address: str, stub: TokenServiceAsyncStub, create: Create
) -> None:
    """Cached answers of the client library count like those of a server. Closing the verifier hands
    on all of them at once."""
    created = await create()
    await stub.Verify(pb.VerifyRequest(secret=created.secret), timeout=5)
    uses = 1
    async with latchkey.Verifier(address, timeout_seconds=5) as verifier:
        await has_lease(verifier)
        while verifier.verify_nowait(created.secret) is None:
            assert (await verifier.verify(created.secret)).allowed
            uses += 1
        uses += 1
        for _ in range(7):
            assert (await verifier.verify(created.secret, Scope.READ)).allowed
        refused = await verifier.verify(created.secret, Scope.WRITE)
        assert refused.verdict is Verdict.INSUFFICIENT_SCOPE
        uses += 7
    await used(stub, created.token, {"": uses})


async def test_a_running_client_reports(
    address: str, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client library reports while it runs, again and again, and its methods return the uses."""
    monkeypatch.setattr(_uses, "REPORT_SECONDS_MAX", 0.05)
    created = await create()
    async with (
        latchkey.Client(address) as client,
        latchkey.Verifier(address, timeout_seconds=5) as verifier,
    ):
        await has_lease(verifier)
        uses = 0
        for _ in range(2):
            while verifier.verify_nowait(created.secret) is None:
                uses += (await verifier.verify(created.secret)).allowed
            uses += 1

            async def reported(expected: int = uses) -> bool:
                usage = await client.get_usage(ACCOUNT, created.token.id)
                return [sum(caller.days.values()) for caller in usage] == [expected]

            # The writer looks at each message about the lease. The next one is at most 1.5 s away.
            await eventually(reported, f"{uses} uses")
        (usage,) = await client.get_usage(ACCOUNT, created.token.id)
        token = await client.get(ACCOUNT, created.token.id)
        assert (usage.caller, token.last_used_by) == ("", "")
        assert usage.last_used_time == token.last_used_time
        assert set(usage.days) <= {date.today() - timedelta(1), now().date()}  # noqa: DTZ011 - midnight


@pytest.fixture
def restricted(settings: Settings, tmp_path: Path) -> Settings:
    """Settings of a server with a policy."""
    path = tmp_path / "policy.toml"
    path.write_text(policy_text(), "utf-8")
    return settings.model_copy(update={"policy": path})


@contextlib.asynccontextmanager
async def stub_on(address: str) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        yield pb_grpc.TokenServiceStub(channel)


def as_caller(name: str) -> Any:
    return {"metadata": (("authorization", f"Bearer {credential(name)}"),), "timeout": 5}


class Managed:
    """A stub whose calls are those of the manager."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    def __getattr__(self, method: str) -> Any:
        def call(request: Any, timeout: float = 5) -> Any:
            return getattr(self._stub, method)(
                request, **(as_caller("manager") | {"timeout": timeout})
            )

        return call


async def test_uses_are_counted_by_caller(restricted: Settings) -> None:
    """Each caller's uses are counted under its name in the policy, for Verify, BatchVerify and
    reports. A caller that is limited to accounts leaves no trace on a token of another account."""
    async with serving(restricted) as address, stub_on(address) as stub:
        managed = Managed(stub)
        tokens = {
            account: await managed.Create(
                pb.CreateRequest(account_id=account, name="t", scope=READ)
            )
            for account in ("acme", "globex")
        }
        for created in tokens.values():
            request = pb.VerifyRequest(secret=created.secret)
            batch = pb.BatchVerifyRequest(requests=[request, request])
            for caller in ("verifier", "acmes-verifier"):
                await stub.Verify(request, **as_caller(caller))
                await stub.BatchVerify(batch, **as_caller(caller))
        acme, globex = tokens["acme"].token, tokens["globex"].token
        await used(managed, acme, {"acmes-verifier": 3, "verifier": 3})
        await used(managed, globex, {"verifier": 3})
        client = WatchClient(stub, as_caller("verifier")["metadata"])
        await client.granted()
        await client.say(use_report=report(1, use(globex), use(acme)))
        await used(managed, globex, {"verifier": 4})
        token = (await managed.Get(pb.GetRequest(account_id="acme", id=acme.id))).token
        assert token.last_used_by == "acmes-verifier"
        client.call.cancel()
        hostile = WatchClient(stub, as_caller("acmes-verifier")["metadata"])
        with contextlib.suppress(grpc.aio.AioRpcError):
            await hostile.say(use_report=report(1, use(globex), use(acme)))
        assert await hostile.refusal() is grpc.StatusCode.FAILED_PRECONDITION
        await stub.Verify(pb.VerifyRequest(secret=tokens["acme"].secret), **as_caller("verifier"))
        await used(managed, acme, {"verifier": 5, "acmes-verifier": 3})
        assert await usage_of(managed, globex) == {"verifier": 4}


def use(
    token: pb.Token, count: int = 1, first: float = 3600.0, last: float = 3600.0
) -> pb.TokenUse:
    """A use an hour ago, before the token existed, unless a test says otherwise."""
    return pb.TokenUse(
        token_id=token.id,
        hint=token.hint,
        count=count,
        first_use_age=Duration(seconds=int(first)),
        last_use_age=Duration(seconds=int(last)),
    )


def report(number: int, *uses: pb.TokenUse) -> pb.UseReport:
    return pb.UseReport(number=number, uses=uses)


async def test_reports_are_corrected(
    address: str, stub: TokenServiceAsyncStub, create: Create
) -> None:
    """A report cannot set times in the future or before the token, or name a token that does not
    exist. A number that was received is confirmed once, and its uses count once."""
    early, late, dead = await create(), await create(), await create()
    await stub.Delete(pb.DeleteRequest(account_id=ACCOUNT, id=dead.token.id), timeout=8)
    unknown = pb.Token(id="tok_" + "0" * 26, hint="lk_…abcd")
    before = now()
    uses = (
        use(early.token),
        use(late.token, 2, first=-3600.0, last=-3600.0),
        use(unknown),
        use(dead.token),
        pb.TokenUse(token_id="a\0b", count=1),
        pb.TokenUse(),
    )
    async with watching(address) as client:
        await client.granted()
        await client.say(use_report=report(1, *uses))
        received = await client.hear()
        assert received == pb.UseReportReceived(number=1)
        await client.say(use_report=report(1, *uses))
        await client.say(use_report=report(2, use(early.token, 2), use(early.token, -5)))
        assert await client.hear() == pb.UseReportReceived(number=2)
    await used(stub, early.token, {"": 3})
    await used(stub, late.token, {"": 2})
    after = now()
    for token, earliest, latest in (
        (early.token, early.token.create_time.ToDatetime(UTC), before),
        (late.token, before, after),
    ):
        got = (await stub.Get(pb.GetRequest(account_id=ACCOUNT, id=token.id), timeout=5)).token
        assert earliest <= got.last_used_time.ToDatetime(UTC) <= latest


async def test_each_secret_has_its_last_use(
    address: str, stub: TokenServiceAsyncStub, create: Create
) -> None:
    """After a rotation, each secret of a token has its last use, from servers and from clients. The
    token has the latest of them, and its uses on all secrets add up."""
    created = await create()
    named: dict[str, Any] = {"account_id": ACCOUNT, "id": created.token.id}
    grace = Duration(seconds=3600)
    rotated = await stub.Rotate(pb.RotateRequest(**named, grace=grace), timeout=8)
    hints = [rotated.token.hint, created.token.hint]
    assert [secret.hint for secret in rotated.token.secrets] == hints
    assert not any(secret.HasField("last_used_time") for secret in rotated.token.secrets)

    async def shown(expected: set[str]) -> pb.Token:
        async def all_shown() -> pb.Token | None:
            token = (await stub.Get(pb.GetRequest(**named), timeout=5)).token
            used = {s.hint for s in token.secrets if s.HasField("last_used_time")}
            return token if used == expected else None

        token: pb.Token = await eventually(all_shown, f"uses of {expected}")
        return token

    # The older secret, which the token itself no longer shows.
    await stub.Verify(pb.VerifyRequest(secret=created.secret), timeout=5)
    token = await shown({created.token.hint})
    assert token.last_used_time == token.secrets[1].last_used_time
    async with watching(address) as client:
        await client.granted()
        await client.say(use_report=report(1, use(rotated.token, last=0.0)))
    token = await shown(set(hints))
    newest, oldest = token.secrets
    assert oldest.last_used_time.ToNanoseconds() < newest.last_used_time.ToNanoseconds()
    assert token.last_used_time == newest.last_used_time
    await used(stub, created.token, {"": 2})
    # A change keeps what is known of the uses.
    disabled = await stub.Disable(pb.DisableRequest(**named), timeout=8)
    assert disabled.token.last_used_time == token.last_used_time
    assert [s.last_used_time for s in disabled.token.secrets] == [
        newest.last_used_time,
        oldest.last_used_time,
    ]


async def test_tokens_without_a_recent_use_are_selected(
    stub: TokenServiceAsyncStub, create: Create
) -> None:
    """DeleteAll with `unused_since` spares tokens that were used since."""
    busy, idle = await create(), await create()
    await stub.Verify(pb.VerifyRequest(secret=idle.secret), timeout=5)
    await used(stub, idle.token, {"": 1})
    since = Timestamp()
    since.GetCurrentTime()
    await stub.Verify(pb.VerifyRequest(secret=busy.secret), timeout=5)
    await used(stub, busy.token, {"": 1})
    request = pb.DeleteAllRequest(
        account_id=ACCOUNT, filter=pb.TokenFilter(unused_since=since), dry_run=True
    )
    answer = await stub.DeleteAll(request, timeout=8)
    assert [token.id for token in answer.tokens] == [idle.token.id]


async def test_a_client_that_does_not_report_is_served_as_before(
    address: str, stub: TokenServiceAsyncStub, create: Create
) -> None:
    """An older client gets no confirmation of a report, which it would not understand."""
    created = await create()
    async with watching(address) as client:
        for _ in range(3):
            await client.granted()
        await stub.Verify(pb.VerifyRequest(secret=created.secret), timeout=5)
        await used(stub, created.token, {"": 1})
        await client.granted()


async def test_a_server_that_stops_writes_the_uses(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clean stop of a server loses no use, including those that clients report in the
    meantime."""

    async def write_nothing(_writer: UsageWriter) -> None:
        await asyncio.Event().wait()

    # Only of servers that start now. A long interval would also stop those that other tests share.
    monkeypatch.setattr(UsageWriter, "run", write_nothing)
    began = time.time()
    async with serving(settings) as address, stub_on(address) as stub:
        created = await stub.Create(
            pb.CreateRequest(account_id=ACCOUNT, name="t", scope=READ), timeout=5
        )
        verifier = latchkey.Verifier(address, timeout_seconds=5)
        await verifier.verify(created.secret)
        uses = 1
        await has_lease(verifier)
        while verifier.verify_nowait(created.secret) is None:
            await verifier.verify(created.secret)
            uses += 1
        uses += 1
        await verifier.close()
        await stub.Verify(pb.VerifyRequest(secret=created.secret), timeout=5)
        assert await usage_of(stub, created.token) == {}
    async with serving(settings) as address, stub_on(address) as stub:
        await used(stub, created.token, {"": uses + 1})
        token = (
            await stub.Get(pb.GetRequest(account_id=ACCOUNT, id=created.token.id), timeout=5)
        ).token
        assert began - 1 <= token.last_used_time.seconds <= time.time()
