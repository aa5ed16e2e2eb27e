"""Every method × every kind of caller × every listener: who gets in, and who does not."""

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest
from cryptography import x509
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2
from latchkey_proto.v1 import audit_service_pb2 as audit_pb
from latchkey_proto.v1 import maintenance_service_pb2 as maintenance_pb
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_service.access.methods import METHODS
from latchkey_service.access.policy import PolicyError
from latchkey_service.process.wiring import Server
from latchkey_service.settings.settings import Settings

from tests.callers import (
    ACCOUNT,
    CALLERS,
    OTHER_ACCOUNT,
    PROXY,
    Identity,
    channel_credentials,
    credential,
    dns_identity,
    made,
    policy_text,
    spiffe_identity,
    stranger,
    uri,
    write_server_files,
)
from tests.conftest import TEMPLATE, serving_as, with_database
from tests.support import session

TOKENS = "/latchkey.v1.TokenService/"
STATUS = "/latchkey.v1.StatusService/GetStatus"
AUDIT = "/latchkey.v1.AuditService/List"
INVALIDATE_ALL = "/latchkey.v1.MaintenanceService/InvalidateAll"
HEALTH = "/grpc.health.v1.Health/Check"
# Written down once more, apart from the table that is tested by it.
MAY = {
    "verifier": {TOKENS + "Verify", TOKENS + "BatchVerify", TOKENS + "Watch"},
    "manager": {TOKENS + name for name in ("Create", "Get", "List", "Delete")},
    "operator": {STATUS, AUDIT, INVALIDATE_ALL},
}
OURS = sorted(set().union(*MAY.values()))
LISTENERS = (
    "native",
    "grpcio",
    "native unix proxy",
    "grpcio unix proxy",
    "mutual tls",
    "tls",
)
OK = grpc.StatusCode.OK
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
DENIED = grpc.StatusCode.PERMISSION_DENIED
WATCH_REFUSED = grpc.StatusCode.FAILED_PRECONDITION
# Of a handshake that fails: the client has no connection.
NO_CONNECTION = grpc.StatusCode.UNAVAILABLE

Metadata = tuple[tuple[str, str], ...]
_names = count(1)


@dataclass
class Listener:
    """Where to call, and how this listener is told who calls."""

    name: str
    target: str
    server: Server
    database_url: str
    secrets: dict[str, str]
    ids: dict[str, str]

    @property
    def encrypted(self) -> bool:
        return self.name.endswith("tls")

    @contextlib.asynccontextmanager
    async def channel(self, identity: Identity | None = None) -> AsyncIterator[grpc.aio.Channel]:
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
        if self.encrypted:
            channel = grpc.aio.secure_channel(
                self.target, channel_credentials(identity), options=options
            )
        else:
            channel = grpc.aio.insecure_channel(self.target, options=options)
        async with channel:
            yield channel


@pytest.fixture(scope="module")
async def listeners(
    postgres_url: str, template_url: str, pepper_file: Path, scratch: Path
) -> AsyncIterator[dict[str, Listener]]:
    """Servers for all listeners, each with a token of either account."""
    files = write_server_files(scratch)
    without_ca = {name: path for name, path in files.items() if name != "tls_client_ca"}
    tls = {"tls_listen": "localhost:0"}
    plan: list[tuple[tuple[str, ...], dict[str, Any]]] = [
        (("native", "mutual tls"), {"transport": "native", **tls, **files}),
        (("grpcio", "tls"), {"transport": "grpcio", **tls, **without_ca}),
    ] + [
        (
            (f"{transport} unix proxy",),
            {
                "transport": transport,
                "listen": f"unix:{scratch}/{transport}.sock",
                "trusted_proxy": PROXY,
            },
        )
        for transport in ("native", "grpcio")
    ]
    found = {}
    async with contextlib.AsyncExitStack() as stack:
        for names, more in plan:
            url = await fresh_database(postgres_url)
            policy = scratch / f"{names[0]}.toml"
            policy.write_text(policy_text())
            given: Any = {
                "database_url": url,
                "pepper_file": pepper_file,
                "data_dir": scratch / "unused",
                "listen": "127.0.0.1:0",
                "grace_seconds": 0.2,
                "policy": policy,
                "reflection": "on",
            }
            settings = Settings(**(given | more))
            server = await stack.enter_async_context(serving_as(settings))
            secrets, ids = await tokens_of(server.address, more.get("trusted_proxy"))
            for name in names:
                target = server.address if name == names[0] else server.tls_address
                assert target is not None
                found[name] = Listener(name, target, server, url, secrets, ids)
        yield found


async def fresh_database(postgres_url: str) -> str:
    name = f"callers_{next(_names)}"
    connection = await asyncpg.connect(postgres_url)
    await connection.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    await connection.close()
    return with_database(postgres_url, name)


async def tokens_of(address: str, proxy: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """Create a token of either account; return secrets and ids by account."""
    secrets, ids = {}, {}
    async with grpc.aio.insecure_channel(address) as channel:
        for account in (ACCOUNT, OTHER_ACCOUNT):
            request = pb.CreateRequest(account_id=account, name="seed", scope=pb.SCOPE_READ)
            created = await unary(channel, TOKENS + "Create", request, bearer("manager"))
            secrets[account], ids[account] = created.secret, created.token.id
    return secrets, ids


def bearer(name: str) -> Metadata:
    return (("authorization", f"Bearer {credential(name)}"),)


def forwarded(names: str, by: str = PROXY) -> Metadata:
    return (("x-forwarded-client-cert", f'By={by};Hash=abcd;Subject="CN=x,O=y";{names}'),)


async def unary(channel: grpc.aio.Channel, path: str, request: Any, metadata: Metadata) -> Any:
    call = channel.unary_unary(
        path,
        request_serializer=type(request).SerializeToString,
        response_deserializer=response_type(path).FromString,
    )
    return await call(request, metadata=metadata, timeout=5)


def response_type(path: str) -> Any:
    service, name = path.strip("/").split("/")
    pool: Any = descriptor_pool.Default()
    method = pool.FindServiceByName(service).methods_by_name[name]
    return message_factory.GetMessageClass(method.output_type)


@contextlib.asynccontextmanager
async def watching(channel: grpc.aio.Channel, metadata: Metadata) -> AsyncIterator[Any]:
    """A Watch."""
    method: Any = channel.stream_stream(
        TOKENS + "Watch",
        request_serializer=pb.WatchRequest.SerializeToString,
        response_deserializer=pb.WatchResponse.FromString,
    )
    call = method(metadata=metadata, timeout=20)
    try:
        yield call
    finally:
        call.cancel()


async def watch(channel: grpc.aio.Channel, metadata: Metadata) -> None:
    """Ask for a grant, and get it."""
    try:
        async with watching(channel, metadata) as stream:
            await stream.write(pb.WatchRequest(number=1))
            assert await stream.read() is not grpc.aio.EOF
    except grpc.aio.AioRpcError as error:
        if error.details() != "Internal error from Core":
            raise
        # What the client (grpcio 1.75) makes of a write to a call that has been refused meanwhile.
        # Who writes nothing is told how it was refused.
        async with watching(channel, metadata) as stream:
            await stream.read()


async def call(
    listener: Listener, channel: grpc.aio.Channel, path: str, metadata: Metadata, account: str
) -> grpc.StatusCode:
    """Make a call that succeeds for whoever may make it; return its status."""
    requests: dict[str, Callable[[], Any]] = {
        TOKENS + "Verify": lambda: pb.VerifyRequest(secret=listener.secrets[account]),
        TOKENS + "BatchVerify": lambda: pb.BatchVerifyRequest(
            requests=[pb.VerifyRequest(secret=listener.secrets[account])]
        ),
        TOKENS + "Create": lambda: pb.CreateRequest(
            account_id=account, name=f"n{next(_names)}", scope=pb.SCOPE_READ
        ),
        TOKENS + "Get": lambda: pb.GetRequest(account_id=account, id=listener.ids[account]),
        TOKENS + "List": lambda: pb.ListRequest(account_id=account),
        TOKENS + "Delete": lambda: pb.DeleteRequest(
            account_id=account, id=listener.ids[f"{account} doomed"], no_wait=True
        ),
        STATUS: status_pb.GetStatusRequest,
        INVALIDATE_ALL: maintenance_pb.InvalidateAllRequest,
        AUDIT: lambda: audit_pb.AuditServiceListRequest(account_id=account),
    }
    try:
        if path == TOKENS + "Watch":
            await watch(channel, metadata)
        else:
            await unary(channel, path, requests[path](), metadata)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return OK


async def statuses(
    listener: Listener, identity: Identity | None, metadata: Metadata, account: str = ACCOUNT
) -> dict[str, grpc.StatusCode]:
    """Call every method; return what each answered. There is something to delete."""
    async with session(listener.database_url) as connection:
        doomed = await connection.fetchval(
            """
            INSERT INTO token (id, account_id, name, name_key, scope, create_time, hint)
            SELECT 'tok_' || lpad($2::text, 26, '0'), $1, 'd' || $2, 'd' || $2, 1, now(), ''
            RETURNING id
            """,
            account,
            str(next(_names)),
        )
        listener.ids[f"{account} doomed"] = doomed
        before = await alive(connection)
        async with listener.channel(identity) as channel:
            found = {path: await call(listener, channel, path, metadata, account) for path in OURS}
        gone = found[TOKENS + "Delete"] is OK
        made = found[TOKENS + "Create"] is OK
        # What was refused has not been done all the same.
        assert await alive(connection) == before + made - gone
        await connection.execute("DELETE FROM token WHERE id = $1", doomed)
    return found


async def alive(connection: Any) -> int:
    number: int = await connection.fetchval("SELECT count(*) FROM token WHERE delete_time IS NULL")
    return number


def expected(name: str, account: str = ACCOUNT) -> dict[str, grpc.StatusCode]:
    """What each method answers to a caller that is known."""
    role, accounts = CALLERS[name]
    found = {path: OK if path in MAY[role] else DENIED for path in OURS}
    if accounts is not None:
        # It affects all accounts.
        found[INVALIDATE_ALL] = DENIED
        if role == "verifier":
            found[TOKENS + "Watch"] = WATCH_REFUSED
        elif account != ACCOUNT:
            # All that names an account. Status names none.
            found = {p: OK if (c is OK and p == STATUS) else DENIED for p, c in found.items()}
    return found


def all_are(code: grpc.StatusCode) -> dict[str, grpc.StatusCode]:
    return dict.fromkeys(OURS, code)


def presented(listener: str, name: str) -> list[tuple[Identity | None, Metadata]]:
    """All ways in which a caller can say on this listener who it is."""
    certificate = None
    if listener == "mutual tls":
        certificate = spiffe_identity(uri(name))
        return [
            (certificate, ()),
            (dns_identity("elsewhere.internal", f"{name}.internal"), ()),
            (certificate, bearer(name)),
        ]
    ways: list[tuple[Identity | None, Metadata]] = [(None, bearer(name))]
    if "proxy" in listener:
        ways += [
            (None, forwarded(f"URI={uri(name)}")),
            (None, forwarded(f"DNS=elsewhere.internal;DNS={name}.internal")),
            (None, (*forwarded(f"URI={uri(name)}"), *bearer(name))),
        ]
    return ways


def test_the_table_has_every_method() -> None:
    """Each method of our services has been given to somebody here, and in the service's table:
    whoever adds one decides who may call it."""
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
        # Each is where it says to be.
        service, name = path.strip("/").split("/")
        assert pool.FindServiceByName(service).methods_by_name[name]


@pytest.mark.parametrize("name", CALLERS)
@pytest.mark.parametrize("listener", LISTENERS)
async def test_known_callers(listeners: dict[str, Listener], listener: str, name: str) -> None:
    """Whoever is known may call exactly what their roles have, for exactly their accounts, however
    they say who they are."""
    here = listeners[listener]
    for identity, metadata in presented(listener, name):
        assert await statuses(here, identity, metadata) == expected(name), metadata
    identity, metadata = presented(listener, name)[0]
    found = await statuses(here, identity, metadata, OTHER_ACCOUNT)
    assert found == expected(name, OTHER_ACCOUNT)


@pytest.mark.parametrize("listener", LISTENERS)
async def test_unknown_callers(listeners: dict[str, Listener], listener: str) -> None:
    """Nobody, and who says to be somebody that is not known, or says it wrong, may call nothing."""
    here = listeners[listener]
    identity = spiffe_identity(uri("manager")) if listener == "mutual tls" else None
    unknown: list[Metadata] = [
        bearer("revoked"),
        (("authorization", "Bearer "),),
        (("authorization", f"Basic {credential('manager')}"),),
        (("authorization", credential("manager")),),
        (("authorization", f"Bearer {credential('manager')} "),),
        (*bearer("manager"), *bearer("manager")),
        (*bearer("manager"), *bearer("verifier")),
    ]
    if listener != "mutual tls":
        unknown.append(())
        # One that is believed elsewhere.
        if "proxy" not in listener:
            unknown.append(forwarded(f"URI={uri('manager')}"))
    for metadata in unknown:
        found = await statuses(here, identity, metadata)
        assert found == all_are(UNAUTHENTICATED), metadata


@pytest.mark.parametrize("listener", ["native unix proxy", "grpcio unix proxy"])
async def test_what_a_proxy_may_not_say(listeners: dict[str, Listener], listener: str) -> None:
    """What is not of the named proxy, not of the form, or ambiguous, is nobody's."""
    manager = f"URI={uri('manager')}"
    wrong: list[Metadata] = [
        forwarded(manager, by="spiffe://example.org/someone"),
        (("x-forwarded-client-cert", manager),),
        forwarded("URI=spiffe://example.org/nobody"),
        forwarded(f"{manager};URI={uri('verifier')}"),
        forwarded("DNS=manager.internal;DNS=verifier.internal"),
        # A SPIFFE name that is not known is not made up for by a DNS name that is.
        forwarded("URI=spiffe://example.org/nobody;DNS=manager.internal"),
        # Others' elements, before and after the proxy's own.
        (*forwarded(manager), ("x-forwarded-client-cert", "By=spiffe://x/y;Hash=ab")),
        (("x-forwarded-client-cert", "By=spiffe://x/y;Hash=ab"), *forwarded(manager)),
        (*forwarded(manager), *forwarded(manager)),
        forwarded(f"URI={uri('verifier')},By={PROXY};{manager}"),
        # A SPIFFE name has no other URI beside it; and what may be a part of a name.
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


async def test_certificates_that_are_not_good(listeners: dict[str, Listener]) -> None:
    """A certificate that is expired, of another CA, or missing gets no connection; one of other
    names gets nothing; one with two SPIFFE names, with a name that only begins as a caller's, or
    with another's credential, neither."""
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
        # gRPC tells of each the part before the NUL, which is a caller's name.
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
async def test_tricks_with_the_path(listeners: dict[str, Listener], listener: str) -> None:
    """However a path is spelled, a caller that may not call the method does not get to it; and who
    may gets to no other method by it."""
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
    async with session(here.database_url) as connection:
        before = await alive(connection)
        async with here.channel(identity) as channel:
            for path in tricks:
                method: Any = channel.unary_unary(path)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await method(data, metadata=metadata, timeout=5)
                assert caught.value.code() in (
                    DENIED,
                    grpc.StatusCode.UNIMPLEMENTED,
                    # Of a path that HTTP does not allow.
                    grpc.StatusCode.INTERNAL,
                    grpc.StatusCode.UNAVAILABLE,
                ), path
        assert await alive(connection) == before


@pytest.mark.parametrize("listener", LISTENERS)
async def test_health_and_reflection_are_open(
    listeners: dict[str, Listener], listener: str
) -> None:
    """Health answers everyone, and reflection where it is on."""
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
    """A verifier for one account learns nothing of another's token, in a batch neither; one for
    all accounts does."""
    here = listeners[listener]
    for name, verdict in (
        ("acmes-verifier", pb.VERDICT_UNKNOWN),
        ("verifier", pb.VERDICT_VALID),
    ):
        identity, metadata = presented(listener, name)[0]
        async with here.channel(identity) as channel:
            questions = [pb.VerifyRequest(secret=here.secrets[a]) for a in (ACCOUNT, OTHER_ACCOUNT)]
            # Twice: once read, once remembered.
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
async def test_a_right_that_is_taken_away(
    listeners: dict[str, Listener], listener: str, way: int
) -> None:
    """Once the policy that is in force has somebody no more, they may call nothing, on
    connections that they have already too, and the streams that they have end; a policy that is
    broken changes nothing."""
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
