"""InvalidateAll as a client sees it, over each transport."""

import asyncio
import os
from pathlib import Path
from typing import Any

import grpc
import latchkey
from latchkey_proto.v1 import audit_service_pb2 as audit_pb
from latchkey_proto.v1 import audit_service_pb2_grpc as audit_pb_grpc
from latchkey_proto.v1 import maintenance_service_pb2 as maintenance_pb
from latchkey_proto.v1 import maintenance_service_pb2_grpc as maintenance_pb_grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.settings.settings import Settings

from tests.helpers.callers import credential, policy_text
from tests.helpers.calls import CHANNEL_OPTIONS
from tests.helpers.databases import session
from tests.helpers.rich_status import refusal
from tests.helpers.servers import serving
from tests.helpers.waiting import WAIT_SECONDS, eventually
from tests.helpers.watch_client import watching

# Longer than a busy machine delays any step here: no lease ends in the middle of a test.
LONG_LEASE_SECONDS = 5.0
# Short enough to wait for.
LEASE_SECONDS = 1.0
# A call waits for one lease at most; a busy machine adds the rest.
CALL_SECONDS_MAX = 5.0
METHOD = "/latchkey.v1.MaintenanceService/InvalidateAll"
# Without a pause between the calls of an operator, a fifth of them fail.
LOOP_VERIFIES = 100


async def invalidate_all(address: str, **options: Any) -> pb.Receipt:
    """Call InvalidateAll on a connection of the test's own, and return the receipt."""
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub = maintenance_pb_grpc.MaintenanceServiceStub(channel)
        options.setdefault("timeout", WAIT_SECONDS)
        answer = await stub.InvalidateAll(maintenance_pb.InvalidateAllRequest(), **options)
    receipt: pb.Receipt = answer.receipt
    return receipt


async def make_token(address: str) -> pb.CreateResponse:
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        request = pb.CreateRequest(account_id="acme", name="a", scope=pb.SCOPE_READ)
        created: pb.CreateResponse = await pb_grpc.TokenServiceStub(channel).Create(request)
    return created


async def verdict(address: str, secret: str) -> int:
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        request = pb.VerifyRequest(secret=secret)
        answer = await pb_grpc.TokenServiceStub(channel).Verify(request, timeout=WAIT_SECONDS)
    return int(answer.verdict)


async def lose_tokens(database_url: str) -> None:
    """Remove all tokens from the database without a revision, as a restore does."""
    async with session(database_url) as connection:
        await connection.execute("DELETE FROM secret; DELETE FROM token")


def with_lease(settings: Settings, seconds: float) -> Settings:
    return settings.model_copy(update={"lease_seconds": seconds})


async def test_all_caches_are_empty_when_it_returns(settings: Settings, database_url: str) -> None:
    """Two servers and a client library of each have cached a token that a restore has removed from
    the database. After InvalidateAll returns, none of them accepts the token, and the receipt
    counts all four."""
    settings = with_lease(settings, LONG_LEASE_SECONDS)
    async with (
        serving(settings) as first,
        serving(settings) as second,
        latchkey.Verifier(first) as verifier,
        latchkey.Verifier(second) as other_verifier,
    ):
        secret = (await make_token(first)).secret
        for address in (first, second):
            assert await verdict(address, secret) == pb.VERDICT_VALID
        for client in (verifier, other_verifier):
            assert (await client.verify(secret)).allowed

            async def remembers(client: latchkey.Verifier = client) -> bool:
                await client.verify(secret)
                answer = client.verify_nowait(secret)
                return answer is not None and answer.allowed

            await eventually(remembers, "the client library caches the token")
        await lose_tokens(database_url)
        assert await verdict(first, secret) == await verdict(second, secret) == pb.VERDICT_VALID
        receipt = await invalidate_all(second)
        nowait = [client.verify_nowait(secret) for client in (verifier, other_verifier)]
        assert nowait == [None, None]
        for address in (first, second):
            assert await verdict(address, secret) == pb.VERDICT_UNKNOWN
        for client in (verifier, other_verifier):
            assert (await client.verify(secret)).verdict is latchkey.Verdict.UNKNOWN
        assert (receipt.verifiers_acknowledged, receipt.verifiers_outwaited) == (2, 0)
        assert (receipt.clients_acknowledged, receipt.clients_outwaited) == (2, 0)
        assert receipt.revision == 1
        assert receipt.mark != 0
        assert receipt.effective_time.ToNanoseconds() >= receipt.commit_time.ToNanoseconds()


async def test_each_call_clears_the_caches_again(settings: Settings, database_url: str) -> None:
    """A repeated call takes the next revision and clears what was cached since the first one. It
    changes no token: live ones stay valid."""
    async with serving(with_lease(settings, LONG_LEASE_SECONDS)) as address:
        secret = (await make_token(address)).secret
        assert await verdict(address, secret) == pb.VERDICT_VALID
        assert (await invalidate_all(address)).revision == 1
        assert await verdict(address, secret) == pb.VERDICT_VALID
        await lose_tokens(database_url)
        assert await verdict(address, secret) == pb.VERDICT_VALID
        assert (await invalidate_all(address)).revision == 2
        assert await verdict(address, secret) == pb.VERDICT_UNKNOWN


async def test_a_client_is_reset_and_confirms(settings: Settings) -> None:
    """A client under a lease receives a Reset. The call returns once the client has confirmed it,
    and counts the client."""
    async with (
        serving(with_lease(settings, LONG_LEASE_SECONDS)) as address,
        watching(address) as client,
    ):
        await client.granted()
        calling = asyncio.create_task(invalidate_all(address))
        event = await client.hear()
        assert isinstance(event, pb.Reset)
        assert not calling.done()
        await client.say()
        receipt = await calling
        assert (event.revision, event.mark) == (receipt.revision, receipt.mark)
        assert (receipt.clients_acknowledged, receipt.clients_outwaited) == (1, 0)


async def test_a_short_deadline_fails_as_not_confirmed(settings: Settings) -> None:
    """With a deadline before the end of a silent client's lease, the call fails with
    DELETION_NOT_CONFIRMED in time. Its message names caches, not a token."""
    async with (
        serving(with_lease(settings, LONG_LEASE_SECONDS)) as address,
        watching(address) as client,
    ):
        await client.granted()
        failure = await refusal(invalidate_all(address, timeout=LONG_LEASE_SECONDS / 5))
        assert failure.code is grpc.StatusCode.UNAVAILABLE
        assert failure.reason == "DELETION_NOT_CONFIRMED"
        assert "cache is empty" in failure.message
        assert "token" not in failure.message
        # Otherwise the server would wait for the lease to expire before it stops.
        await client.say(released=True)


def bearer(name: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {credential(name)}"),)


async def test_operators_of_all_accounts_may_call_it(settings: Settings, scratch: Path) -> None:
    """Only an operator whose policy names no accounts may clear the caches of all accounts.
    Rejected calls take no revision. Every call leaves an audit entry with its caller, under its own
    request id."""
    policy = scratch / f"maintenance-{os.urandom(4).hex()}.toml"
    policy.write_text(policy_text())
    settings = settings.model_copy(update={"policy": policy})
    refused = {
        (): ("UNAUTHENTICATED", "CALLER_ANONYMOUS"),
        bearer("manager"): ("PERMISSION_DENIED", "METHOD_DENIED"),
        bearer("verifier"): ("PERMISSION_DENIED", "METHOD_DENIED"),
        bearer("acmes-operator"): ("PERMISSION_DENIED", "ACCOUNT_DENIED"),
    }
    async with serving(settings) as address:
        for metadata, expected in refused.items():
            failure = await refusal(invalidate_all(address, metadata=metadata))
            assert (failure.code.name, failure.reason) == expected
        metadata = (*bearer("operator"), ("x-request-id", "restored-1"))
        assert (await invalidate_all(address, metadata=metadata)).revision == 1

        async def entries() -> list[tuple[str, int, str]]:
            async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
                stub = audit_pb_grpc.AuditServiceStub(channel)
                page = await stub.List(
                    audit_pb.AuditServiceListRequest(method=METHOD),
                    timeout=WAIT_SECONDS,
                    metadata=bearer("operator"),
                )
            assert {entry.method for entry in page.entries} == {METHOD}
            assert {(entry.account_id, entry.token_id) for entry in page.entries} == {("", "")}
            assert [e.request_id for e in page.entries if not e.code] == ["restored-1"]
            assert len(page.entries) == len(refused) + 1
            return [(entry.caller, entry.code, entry.reason) for entry in page.entries]

        found = await eventually(entries, "every call is in the audit log")
        denied, anonymous = 7, 16
        assert sorted(found) == [
            ("", anonymous, "CALLER_ANONYMOUS"),
            ("acmes-operator", denied, "ACCOUNT_DENIED"),
            ("manager", denied, "METHOD_DENIED"),
            ("operator", 0, ""),
            ("verifier", denied, "METHOD_DENIED"),
        ]


async def test_a_receipt_counts_servers_and_clients_separately(settings: Settings) -> None:
    """The client library's receipt contains every count of the contract's receipt."""
    async with (
        serving(with_lease(settings, LONG_LEASE_SECONDS)) as address,
        latchkey.Client(address) as operator,
        latchkey.Verifier(address) as verifier,
    ):
        await eventually(lambda: verifier.stats().watching, "the client library watches")
        receipt = await operator.invalidate_all(timeout_seconds=WAIT_SECONDS)
        assert (receipt.verifiers_acknowledged, receipt.verifiers_outwaited) == (1, 0)
        assert (receipt.clients_acknowledged, receipt.clients_outwaited) == (1, 0)
        assert receipt.mark
        assert receipt.effective_time is not None


async def test_a_restored_database_learns_the_pepper_again(
    settings: Settings, database_url: str
) -> None:
    """A restored backup is older than the pepper of a running server. The server still creates
    tokens, and then the database knows the pepper again, so that it can check a later host."""
    async with serving(settings) as address:
        await make_token(address)
        async with session(database_url) as connection:
            known = await connection.fetchval("SELECT array_agg(id) FROM pepper")
            await lose_tokens(database_url)
            await connection.execute("DELETE FROM pepper")
            created = await make_token(address)
            assert await connection.fetchval("SELECT array_agg(id) FROM pepper") == known
        assert await verdict(address, created.secret) == pb.VERDICT_VALID


async def test_an_operator_in_a_loop_makes_no_verify_fail(own_address: str) -> None:
    """While an operator calls InvalidateAll as often as it can, each verify is answered."""
    token = await make_token(own_address)
    stop = False

    async def loop(channel: grpc.aio.Channel) -> int:
        stub: Any = maintenance_pb_grpc.MaintenanceServiceStub(channel)
        count = 0
        while not stop:
            await stub.InvalidateAll(maintenance_pb.InvalidateAllRequest(), timeout=WAIT_SECONDS)
            count += 1
        return count

    async with grpc.aio.insecure_channel(own_address, options=CHANNEL_OPTIONS) as channel:
        stub: Any = pb_grpc.TokenServiceStub(channel)
        loops = [asyncio.create_task(loop(channel)) for _ in range(4)]
        try:
            for _ in range(LOOP_VERIFIES):
                answer = await stub.Verify(
                    pb.VerifyRequest(secret=token.secret), timeout=WAIT_SECONDS
                )
                assert answer.verdict == pb.VERDICT_VALID
                await asyncio.sleep(0.01)
        finally:
            stop = True
            counts = await asyncio.gather(*loops)
        assert sum(counts) >= 2
