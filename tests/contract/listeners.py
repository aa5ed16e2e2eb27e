"""Every kind of listener, and every way in which a caller can identify itself on it."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import grpc
from google.protobuf import descriptor_pool, message_factory
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_service.process.server import Server
from latchkey_service.settings.settings import Settings

from tests.helpers.callers import (
    ACCOUNT,
    OTHER_ACCOUNT,
    PROXY,
    Identity,
    channel_credentials,
    credential,
    dns_identity,
    policy_text,
    spiffe_identity,
    uri,
    write_server_files,
)
from tests.helpers.databases import session
from tests.helpers.servers import fresh_database, serving_as

__all__ = [
    "LISTENERS",
    "TOKENS",
    "Listener",
    "Metadata",
    "bearer",
    "forwarded",
    "presented",
    "running_listeners",
    "unary",
    "watching",
]

TOKENS = "/latchkey.v1.TokenService/"
LISTENERS = (
    "native",
    "grpcio",
    "native unix proxy",
    "grpcio unix proxy",
    "mutual tls",
    "tls",
)

Metadata = tuple[tuple[str, str], ...]


@dataclass
class Listener:
    """A listener's address, a session on its database, and how it identifies its callers."""

    name: str
    target: str
    server: Server
    database: "asyncpg.Connection[asyncpg.Record]"
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


@contextlib.asynccontextmanager
async def running_listeners(
    postgres_url: str, pepper_file: Path, scratch: Path
) -> AsyncIterator[dict[str, Listener]]:
    """Run servers for all listeners, with one token of each account."""
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
            database = await stack.enter_async_context(session(url))
            secrets, ids = await tokens_of(server.address, more.get("trusted_proxy"))
            for name in names:
                target = server.address if name == names[0] else server.tls_address
                assert target is not None
                found[name] = Listener(name, target, server, database, secrets, ids)
        yield found


async def tokens_of(address: str, proxy: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """Create a token of each account; return secrets and IDs by account."""
    secrets, ids = {}, {}
    async with grpc.aio.insecure_channel(address) as channel:
        for account in (ACCOUNT, OTHER_ACCOUNT):
            request = pb.CreateRequest(account_id=account, name="seed", scope=pb.SCOPE_READ)
            created = await unary(channel, TOKENS + "Create", request, bearer("manager"))
            secrets[account], ids[account] = created.secret, created.token.id
            spare = pb.CreateRequest(account_id=account, name="spare", scope=pb.SCOPE_READ)
            created = await unary(channel, TOKENS + "Create", spare, bearer("manager"))
            ids[f"{account} spare"] = created.token.id
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
    """An open Watch stream."""
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


def presented(listener: str, name: str) -> list[tuple[Identity | None, Metadata]]:
    """Return every way in which a caller can identify itself on this listener."""
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
