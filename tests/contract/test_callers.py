"""Every method × every kind of caller × every listener: which calls are allowed and which are
not."""

import contextlib
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2
from latchkey_proto.v1 import audit_service_pb2 as audit_pb
from latchkey_proto.v1 import maintenance_service_pb2 as maintenance_pb
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_service.access.methods import METHODS
from latchkey_service.access.policy import PolicyError

from tests.contract.allowed_requests import AUDIT, INVALIDATE_ALL, STATUS, allowed_request
from tests.contract.listeners import (
    LISTENERS,
    TOKENS,
    Listener,
    Metadata,
    bearer,
    forwarded,
    presented,
    running_listeners,
    unary,
    watching,
)
from tests.helpers.callers import (
    ACCOUNT,
    CALLERS,
    OTHER_ACCOUNT,
    PROXY,
    Identity,
    credential,
    dns_identity,
    made,
    policy_text,
    spiffe_identity,
    stranger,
    uri,
)

HEALTH = "/grpc.health.v1.Health/Check"
# Repeats the service's table on purpose, because these tests check that table.
MAY = {
    "verifier": {TOKENS + "Verify", TOKENS + "BatchVerify", TOKENS + "Watch"},
    "manager": {
        TOKENS + name
        for name in (
            *("Create", "Get", "GetLimits", "GetUsage", "List", "Delete", "DeleteAll"),
            *("Update", "Disable", "Enable", "Rotate", "RetireSecrets"),
        )
    },
    "revoker": {TOKENS + "RevokeSecret", TOKENS + "ReportSecret"},
    "importer": {TOKENS + "Import"},
    "operator": {TOKENS + "Find", STATUS, AUDIT, INVALIDATE_ALL},
}
OURS = sorted(set().union(*MAY.values()))
OK = grpc.StatusCode.OK
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
DENIED = grpc.StatusCode.PERMISSION_DENIED
WATCH_REFUSED = grpc.StatusCode.FAILED_PRECONDITION
# The handshake failed: the client has no connection.
NO_CONNECTION = grpc.StatusCode.UNAVAILABLE

_names = count(1)


@pytest.fixture(scope="module")
async def listeners(
    postgres_url: str, template_url: str, pepper_file: Path, scratch: Path
) -> AsyncIterator[dict[str, Listener]]:
    """Servers for all listeners, with one token of each account."""
    async with running_listeners(postgres_url, pepper_file, scratch) as found:
        yield found


async def watch(channel: grpc.aio.Channel, metadata: Metadata) -> None:
    """Request a lease and wait for the grant."""
    try:
        async with watching(channel, metadata) as stream:
            await stream.write(pb.WatchRequest(number=1))
            assert await stream.read() is not grpc.aio.EOF
    except grpc.aio.AioRpcError as error:
        if error.details() != "Internal error from Core":
            raise
        # How the client (grpcio 1.75) reports a write to a call that has been rejected meanwhile. A
        # client that writes nothing sees the reason for the rejection.
        async with watching(channel, metadata) as stream:
            await stream.read()


async def call(
    listener: Listener, channel: grpc.aio.Channel, path: str, metadata: Metadata, account: str
) -> grpc.StatusCode:
    """Make a call that succeeds for every allowed caller; return its status."""
    try:
        if path == TOKENS + "Watch":
            await watch(channel, metadata)
        else:
            await unary(channel, path, allowed_request(listener, path, account), metadata)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return OK


async def statuses(
    listener: Listener, identity: Identity | None, metadata: Metadata, account: str = ACCOUNT
) -> dict[str, grpc.StatusCode]:
    """Call every method and return each status. A token exists for Delete to delete."""
    doomed = await listener.database.fetchval(
        """
        INSERT INTO token (id, account_id, name, name_key, scope, create_time, hint)
        SELECT 'tok_' || lpad($2::text, 26, '0'), $1, 'd' || $2, 'd' || $2, 1, now(), ''
        RETURNING id
        """,
        account,
        str(next(_names)),
    )
    listener.ids[f"{account} doomed"] = doomed
    before = await alive(listener)
    async with listener.channel(identity) as channel:
        found = {path: await call(listener, channel, path, metadata, account) for path in OURS}
    gone = found[TOKENS + "Delete"] is OK
    made = sum(found[TOKENS + name] is OK for name in ("Create", "Import"))
    # Rejected calls must have had no effect.
    assert await alive(listener) == before + made - gone
    await listener.database.execute("DELETE FROM token WHERE id = $1", doomed)
    return found


async def alive(listener: Listener) -> int:
    number: int = await listener.database.fetchval(
        "SELECT count(*) FROM token WHERE delete_time IS NULL"
    )
    return number


def expected(name: str, account: str = ACCOUNT) -> dict[str, grpc.StatusCode]:
    """Return the status of each method for a known caller."""
    role, accounts = CALLERS[name]
    found = {path: OK if path in MAY[role] else DENIED for path in OURS}
    if accounts is not None:
        # They affect all accounts.
        for path in (
            INVALIDATE_ALL,
            *(TOKENS + m for m in ("RevokeSecret", "ReportSecret", "Import", "Find")),
        ):
            found[path] = DENIED
        if role == "verifier":
            found[TOKENS + "Watch"] = WATCH_REFUSED
        elif account != ACCOUNT:
            # All methods that name an account. GetStatus names none.
            found = {p: OK if (c is OK and p == STATUS) else DENIED for p, c in found.items()}
    return found


def all_are(code: grpc.StatusCode) -> dict[str, grpc.StatusCode]:
    return dict.fromkeys(OURS, code)


def test_the_table_has_every_method() -> None:
    """Each method of our services appears in this table and in the service's own table: a new
    method requires a decision about who may call it.
    """
    pool: Any = descriptor_pool.Default()
    defined = {
        f"/{service.full_name}/{method.name}"
        for module in (pb, status_pb, audit_pb, maintenance_pb)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert set(OURS) == defined
    assert {path for path in METHODS if path.startswith("/latchkey.")} == defined
    for path, rule in METHODS.items():
        assert (rule.role is None) == path.startswith("/grpc."), path
        # Each is listed in the right place. Only the older version of reflection has stubs here.
        service, name = path.replace("reflection.v1.", "reflection.v1alpha.").strip("/").split("/")
        assert pool.FindServiceByName(service).methods_by_name[name]


@pytest.mark.parametrize("name", CALLERS)
@pytest.mark.parametrize("listener", LISTENERS)
async def test_known_callers(listeners: dict[str, Listener], listener: str, name: str) -> None:
    """A known caller may call exactly the methods of its roles, for exactly its accounts, whichever
    way it identifies itself."""
    here = listeners[listener]
    for identity, metadata in presented(listener, name):
        assert await statuses(here, identity, metadata) == expected(name), metadata
    identity, metadata = presented(listener, name)[0]
    found = await statuses(here, identity, metadata, OTHER_ACCOUNT)
    assert found == expected(name, OTHER_ACCOUNT)


@pytest.mark.parametrize("listener", LISTENERS)
async def test_unknown_callers(listeners: dict[str, Listener], listener: str) -> None:
    """A caller without credentials, with unknown credentials, or with malformed ones may call
    nothing."""
    here = listeners[listener]
    identity = spiffe_identity(uri("manager")) if listener == "mutual tls" else None
    unknown: list[Metadata] = [
        bearer("revoked"),
        (("authorization", "Bearer "),),
        (("authorization", f"Basic {credential('manager')}"),),
        (("authorization", credential("manager")),),
        (("authorization", f"Bearer {credential('manager')} x"),),
        (*bearer("manager"), *bearer("manager")),
        (*bearer("manager"), *bearer("verifier")),
    ]
    if listener != "mutual tls":
        unknown.append(())
        # Valid on another listener.
        if "proxy" not in listener:
            unknown.append(forwarded(f"URI={uri('manager')}"))
    for metadata in unknown:
        found = await statuses(here, identity, metadata)
        assert found == all_are(UNAUTHENTICATED), metadata


@pytest.mark.parametrize("listener", ["native unix proxy", "grpcio unix proxy"])
async def test_untrusted_proxy_headers_are_refused(
    listeners: dict[str, Listener], listener: str
) -> None:
    """A header that comes from another proxy, has the wrong form, or is ambiguous identifies
    nobody."""
    manager = f"URI={uri('manager')}"
    wrong: list[Metadata] = [
        forwarded(manager, by="spiffe://example.org/someone"),
        (("x-forwarded-client-cert", manager),),
        forwarded("URI=spiffe://example.org/nobody"),
        forwarded(f"{manager};URI={uri('verifier')}"),
        forwarded("DNS=manager.internal;DNS=verifier.internal"),
        # A known DNS name does not make up for an unknown SPIFFE name.
        forwarded("URI=spiffe://example.org/nobody;DNS=manager.internal"),
        # Elements from other proxies, before and after the trusted proxy's own.
        (*forwarded(manager), ("x-forwarded-client-cert", "By=spiffe://x/y;Hash=ab")),
        (("x-forwarded-client-cert", "By=spiffe://x/y;Hash=ab"), *forwarded(manager)),
        (*forwarded(manager), *forwarded(manager)),
        forwarded(f"URI={uri('verifier')},By={PROXY};{manager}"),
        # A SPIFFE name must be the only URI in its certificate. Values must not look like parts of
        # a name.
        forwarded(f"URI=http://x;{manager}"),
        forwarded(f"DNS=x;{manager}"),
        forwarded("DNS= manager.internal"),
        forwarded("DNS=manager.internal;x=y"),
        forwarded("DNS=manager.internal=y"),
        (*forwarded(manager), *bearer("verifier")),
        (*forwarded(manager), *bearer("revoked")),
        (("x-forwarded-client-cert", f'By={PROXY};Subject="unclosed;{manager}'),),
        (("x-forwarded-client-cert", ""),),
        (("x-forwarded-client-cert", f"By={PROXY}"),),
    ]
    for metadata in wrong:
        found = await statuses(listeners[listener], None, metadata)
        assert found == all_are(UNAUTHENTICATED), metadata


async def test_bad_certificates(listeners: dict[str, Listener]) -> None:
    """An expired, foreign or missing certificate gets no connection. A certificate may call nothing
    if its names are unknown, if it has two SPIFFE names, if its name only begins like a caller's,
    or if it comes with another caller's credential."""
    here = listeners["mutual tls"]
    refused: list[Identity | None] = [
        spiffe_identity(uri("manager"), expired=True),
        stranger("manager.internal"),
        None,
    ]
    for identity in refused:
        found = await statuses(here, identity, bearer("manager"))
        assert found == all_are(NO_CONNECTION)
    unknown: list[tuple[Identity, Metadata]] = [
        (dns_identity("www.manager.internal"), ()),
        (dns_identity("internal"), ()),
        (spiffe_identity(uri("manager") + "/more"), ()),
        (spiffe_identity(uri("manager"), uri("verifier")), ()),
        # gRPC reports each name only up to its NUL, and that part is a caller's name.
        (made([x509.DNSName("manager.internal\0.evil.example")]), ()),
        (made([x509.UniformResourceIdentifier(uri("manager") + "\0/evil")]), ()),
        (made([x509.DNSName("manager.internal"), x509.DNSName("\0")]), bearer("manager")),
        (spiffe_identity("https://manager.internal", uri("manager")), ()),
        (spiffe_identity(uri("manager")), bearer("verifier")),
        (spiffe_identity("spiffe://example.org/nobody"), bearer("manager")),
        (dns_identity("manager.internal", "verifier.internal"), ()),
    ]
    for identity, metadata in unknown:
        found = await statuses(here, identity, metadata)
        assert found == all_are(UNAUTHENTICATED), metadata


@pytest.mark.parametrize("listener", LISTENERS)
async def test_path_tricks(listeners: dict[str, Listener], listener: str) -> None:
    """However a path is spelled, it does not give a caller access to a method that its roles do not
    include, and it does not lead an authorised caller to another method."""
    here = listeners[listener]
    identity = spiffe_identity(uri("verifier")) if listener == "mutual tls" else None
    metadata = () if listener == "mutual tls" else bearer("verifier")
    data = pb.CreateRequest(
        account_id=ACCOUNT, name="trick", scope=pb.SCOPE_WRITE
    ).SerializeToString()
    create = TOKENS + "Create"
    tricks = [
        create,
        "/" + create,
        create.replace("/Create", "//Create"),
        create + "/",
        create.lower(),
        create.replace("Create", "create"),
        create.replace("Create", "%43reate"),
        create.replace("Service/", "Service%2F"),
        create + "?",
        create + "?/latchkey.v1.TokenService/Verify",
        create + "#/Verify",
        create + "%00",
        create + " ",
        "/." + create,
        "/grpc.health.v1.Health/.." + create,
        TOKENS + "Verify/../Create",
        create.replace(".", "/"),
        create[1:],
        "",
    ]
    before = await alive(here)
    async with here.channel(identity) as channel:
        for path in tricks:
            method: Any = channel.unary_unary(path)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await method(data, metadata=metadata, timeout=5)
            assert caught.value.code() in (
                DENIED,
                grpc.StatusCode.UNIMPLEMENTED,
                # The path is not valid HTTP.
                grpc.StatusCode.INTERNAL,
                grpc.StatusCode.UNAVAILABLE,
            ), path
    assert await alive(here) == before


@pytest.mark.parametrize("listener", LISTENERS)
async def test_health_and_reflection_are_open(
    listeners: dict[str, Listener], listener: str
) -> None:
    """Health answers everyone; so does reflection where it is on."""
    here = listeners[listener]
    identity = dns_identity("nobody.internal") if listener == "mutual tls" else None
    async with here.channel(identity) as channel:
        answer = await unary(channel, HEALTH, health_pb2.HealthCheckRequest(), ())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        method: Any = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        )
        stream = method(timeout=5)
        await stream.write(b"\x3a\x00")  # list_services
        assert b"latchkey.v1.TokenService" in await stream.read()
        stream.cancel()


@pytest.mark.parametrize("listener", LISTENERS)
async def test_another_accounts_token_is_unknown(
    listeners: dict[str, Listener], listener: str
) -> None:
    """A verifier for one account learns nothing about another account's token, in a batch either; a
    verifier for all accounts does."""
    here = listeners[listener]
    for name, verdict in (
        ("acmes-verifier", pb.VERDICT_UNKNOWN),
        ("verifier", pb.VERDICT_VALID),
    ):
        identity, metadata = presented(listener, name)[0]
        async with here.channel(identity) as channel:
            questions = [pb.VerifyRequest(secret=here.secrets[a]) for a in (ACCOUNT, OTHER_ACCOUNT)]
            # Twice: first from the database, then from the cache.
            for _ in range(2):
                answer = await unary(channel, TOKENS + "Verify", questions[1], metadata)
                assert answer.verdict == verdict
                assert answer.HasField("token") == (verdict == pb.VERDICT_VALID)
                own = await unary(channel, TOKENS + "Verify", questions[0], metadata)
                assert (own.verdict, own.token.account_id) == (pb.VERDICT_VALID, ACCOUNT)
                batch = await unary(
                    channel,
                    TOKENS + "BatchVerify",
                    pb.BatchVerifyRequest(requests=questions),
                    metadata,
                )
                assert [r.verdict for r in batch.responses] == [pb.VERDICT_VALID, verdict]
                assert batch.responses[1].HasField("token") == (verdict == pb.VERDICT_VALID)


@pytest.mark.parametrize(
    ("listener", "way"),
    [
        ("native", 0),
        ("grpcio", 0),
        ("mutual tls", 0),
        ("native unix proxy", 1),
        ("grpcio unix proxy", 1),
    ],
)
async def test_a_caller_removed_from_the_policy_loses_access(
    listeners: dict[str, Listener], listener: str, way: int
) -> None:
    """Once a new policy without a caller is in force, that caller may call nothing, on open
    connections either, and its streams end. An invalid policy file changes nothing."""
    here = listeners[listener]
    identity, metadata = presented(listener, "verifier")[way]
    question = pb.VerifyRequest(secret=here.secrets[ACCOUNT])
    try:
        async with contextlib.AsyncExitStack() as stack:
            channel = await stack.enter_async_context(here.channel(identity))
            stream = await stack.enter_async_context(watching(channel, metadata))
            await stream.write(pb.WatchRequest(number=1))
            assert await stream.read() is not grpc.aio.EOF
            with pytest.raises(PolicyError):
                await here.server.replace_policy("[callers.verifier]\nroles = [")
            await unary(channel, TOKENS + "Verify", question, metadata)
            others = [name for name in CALLERS if name != "verifier"]
            await here.server.replace_policy(policy_text(others))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await unary(channel, TOKENS + "Verify", question, metadata)
            assert caught.value.code() is UNAUTHENTICATED

            async def ended() -> bool:
                while await stream.read() is not grpc.aio.EOF:
                    pass
                return True

            with pytest.raises(grpc.aio.AioRpcError) as caught:
                assert await ended()
            assert caught.value.code() is UNAUTHENTICATED
    finally:
        await here.server.replace_policy(policy_text())
