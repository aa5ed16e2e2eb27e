"""Latchkey behind a real Envoy, with the documented configuration."""

import asyncio
import contextlib
import importlib.resources
import ssl
from collections.abc import AsyncIterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from latchkey_proto.v1 import audit_service_pb2 as audit_pb
from latchkey_proto.v1 import audit_service_pb2_grpc as audit_pb_grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.settings.settings import Settings
from latchkey_service.transport.transports import MESSAGE_BYTES_MAX, STREAMS_MAX

from tests.fuzz.frames import VERIFY
from tests.helpers import raw_http2 as http2
from tests.helpers.callers import (
    PROXY,
    Identity,
    ca_pem,
    channel_credentials,
    credential,
    dns_identity,
    made,
    policy_text,
    spiffe_identity,
    stranger,
    uri,
)
from tests.helpers.calls import CHANNEL_OPTIONS, is_serving, outcome
from tests.helpers.free_ports import free_port
from tests.helpers.raw_http2 import Frame, connected
from tests.helpers.repository import ROOT
from tests.helpers.servers import serving_as
from tests.helpers.waiting import WAIT_SECONDS, eventually

CONFIGURATION = (ROOT / "docs/envoy.yaml").read_text("utf-8")
STOP_SECONDS = 10.0


def _varint(number: int) -> bytes:
    """Return a length in four bytes: valid in protobuf's encoding, but not the shortest form."""
    return bytes([*(number >> shift & 127 | 128 for shift in (0, 7, 14)), number >> 21])


def in_its_place(text: str, old: str, new: object) -> str:
    """Replace the parts that tests cannot share; everything else stays as documented."""
    assert text.count(old) == 1, old
    return text.replace(old, str(new))


DETAILS = "set_current_client_cert_details: { cert: true }"


@pytest.fixture(scope="module")
async def envoy(
    postgres_url: str, template_url: str, pepper_file: Path, scratch: Path
) -> AsyncIterator[tuple[str, str]]:
    """A Latchkey behind an Envoy; yields the addresses of both."""
    async with envoy_before_latchkey(
        postgres_url, pepper_file, scratch, "envoy", CONFIGURATION
    ) as addresses:
        yield addresses


@contextlib.asynccontextmanager
async def envoy_before_latchkey(
    postgres_url: str, pepper_file: Path, scratch: Path, where: str, configuration: str
) -> AsyncIterator[tuple[str, str]]:
    from tests.helpers.servers import fresh_database

    folder = scratch / where
    folder.mkdir()
    server = made([x509.DNSName("localhost"), x509.UniformResourceIdentifier(PROXY)])
    for name, data in {
        "server.pem": server.certificate,
        "server.key": server.key,
        "clients.pem": ca_pem(),
        "policy.toml": policy_text().encode(),
    }.items():
        (folder / name).write_bytes(data)
    port = free_port()
    text = in_its_place(
        configuration,
        "address: 0.0.0.0, port_value: 50052",
        f"address: 127.0.0.1, port_value: {port}",
    )
    for name in ("server.pem", "server.key", "clients.pem"):
        text = in_its_place(text, f"/etc/latchkey/tls/{name}", folder / name)
    text = in_its_place(text, "path: /run/latchkey/latchkey.sock", f"path: {folder}/latchkey.sock")
    (folder / "envoy.yaml").write_text(text)
    # The Latchkey settings that the file asks for.
    assert f"LATCHKEY_TRUSTED_PROXY={PROXY}\n" in CONFIGURATION
    settings = Settings(
        database_url=await fresh_database(postgres_url),
        pepper_file=pepper_file,
        data_dir=folder / "unused",
        listen=f"unix:{folder}/latchkey.sock",
        grace_seconds=0.2,
        policy=folder / "policy.toml",
        trusted_proxy=PROXY,
    )
    program = importlib.resources.files("envoy") / "_bin" / "envoy"
    async with serving_as(settings) as latchkey:
        with (folder / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                str(program),
                *("-c", "envoy.yaml", "--disable-hot-restart", "--concurrency", "1"),
                cwd=folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            async with channel_to(f"localhost:{port}", "verifier") as channel:

                def alive() -> Any:
                    assert process.returncode is None, (folder / "log").read_text()
                    return is_serving(channel)

                await eventually(alive, "Envoy serves")
            yield f"localhost:{port}", latchkey.address
        finally:
            process.terminate()
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()


@contextlib.asynccontextmanager
async def channel_to(target: str, who: str | Identity | None) -> AsyncIterator[grpc.aio.Channel]:
    identity = spiffe_identity(uri(who)) if isinstance(who, str) else who
    async with grpc.aio.secure_channel(
        target, channel_credentials(identity), options=CHANNEL_OPTIONS
    ) as channel:
        yield channel


Metadata = tuple[tuple[str, str], ...]


async def statuses(
    target: str, who: str | Identity | None, metadata: Metadata = ()
) -> tuple[grpc.StatusCode, grpc.StatusCode]:
    """Verify and create; return both statuses."""
    async with channel_to(target, who) as channel:
        stub = pb_grpc.TokenServiceStub(channel)
        verified = await outcome(
            stub.Verify(pb.VerifyRequest(secret="x"), timeout=WAIT_SECONDS, metadata=metadata)
        )
        request = pb.CreateRequest(account_id="acme", name="made by Envoy", scope=pb.SCOPE_READ)
        created = await outcome(stub.Create(request, timeout=WAIT_SECONDS, metadata=metadata))
    return verified.code, created.code


OK = grpc.StatusCode.OK
DENIED = grpc.StatusCode.PERMISSION_DENIED
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
FORGED = (("x-forwarded-client-cert", f"By={PROXY};Hash=ab;URI={uri('manager')}"),)


async def test_callers_behind_envoy(envoy: tuple[str, str]) -> None:
    """The certificate's URI or DNS name identifies the caller, whatever the caller claims. Without
    a valid certificate there is no connection."""
    target, _ = envoy
    assert await statuses(target, "verifier") == (OK, DENIED)
    assert await statuses(target, dns_identity("manager.internal")) == (DENIED, OK)
    assert await statuses(target, "verifier", FORGED) == (OK, DENIED)
    assert await statuses(target, "nobody") == (UNAUTHENTICATED, UNAUTHENTICATED)
    assert await statuses(target, "nobody", FORGED) == (UNAUTHENTICATED, UNAUTHENTICATED)
    managers = (("authorization", f"Bearer {credential('manager')}"),)
    assert await statuses(target, "verifier", managers) == (UNAUTHENTICATED, UNAUTHENTICATED)
    for bad in (
        None,
        stranger("manager.internal"),
        spiffe_identity(uri("manager"), expired=True),
    ):
        assert await statuses(target, bad) == (UNAVAILABLE, UNAVAILABLE)


# Each contains another caller's name when parsed in parts or only partly.
OTHERS_NAMES = [
    x509.DNSName("x;URI=spiffe://example.org/manager"),
    x509.DNSName(f"x,By={PROXY};URI=spiffe://example.org/manager"),
    x509.DNSName(f"x,By={PROXY};DNS=manager.internal"),
    x509.DNSName(" manager.internal"),
    x509.DNSName("manager.internal\0.evil.example"),
    x509.DNSName("manager.internal\r\n"),
    x509.UniformResourceIdentifier(f"http://x,By={PROXY};URI=spiffe://example.org/manager"),
    x509.UniformResourceIdentifier("http://x;URI=spiffe://example.org/manager"),
    x509.UniformResourceIdentifier("spiffe://example.org/manager\0/evil"),
]


async def test_names_that_contain_other_names(envoy: tuple[str, str]) -> None:
    """A certificate does not identify a caller by a part of a name, whatever meaning the header
    gives that part. Its other names keep their meaning."""
    target, _ = envoy
    for name in (*OTHERS_NAMES, x509.DNSName("x;DNS=manager.internal")):
        found = await statuses(target, made([name]))
        assert found == (UNAUTHENTICATED, UNAUTHENTICATED), name
    names = [x509.DNSName("x;DNS=manager.internal"), x509.DNSName("verifier.internal")]
    assert await statuses(target, made(names)) == (OK, DENIED)


@pytest.mark.parametrize(
    "details", ["uri: true, dns: true", "subject: true, chain: true, uri: true, dns: true"]
)
async def test_envoy_that_forwards_names(
    postgres_url: str, template_url: str, pepper_file: Path, scratch: Path, details: str
) -> None:
    """Envoy may forward names instead of the certificate. It forwards them in the order that
    Latchkey expects, and there too a visible part of a name identifies nobody."""
    text = in_its_place(CONFIGURATION, DETAILS, DETAILS.replace("cert: true", details))
    where = f"names {len(details)}"
    async with envoy_before_latchkey(postgres_url, pepper_file, scratch, where, text) as (
        target,
        _,
    ):
        names = [
            x509.DNSName("a.internal"),
            x509.UniformResourceIdentifier(uri("verifier")),
            x509.DNSName("b.internal"),
        ]
        assert await statuses(target, made(names)) == (OK, DENIED)
        manager = dns_identity("x.internal", "manager.internal")
        assert await statuses(target, manager) == (DENIED, OK)
        for name in OTHERS_NAMES:
            found = await statuses(target, made([name]))
            # Latchkey closes the connection at invalid HTTP.
            assert set(found) <= {UNAUTHENTICATED, UNAVAILABLE}, name


async def test_everything_that_envoy_can_forward(
    postgres_url: str, template_url: str, pepper_file: Path, scratch: Path
) -> None:
    """If Envoy forwards everything that it can, the certificate decides."""
    details = "subject: true, cert: true, chain: true, uri: true, dns: true"
    text = in_its_place(CONFIGURATION, DETAILS, DETAILS.replace("cert: true", details))
    async with envoy_before_latchkey(postgres_url, pepper_file, scratch, "all", text) as (
        target,
        _,
    ):
        assert await statuses(target, "verifier") == (OK, DENIED)
        forged = made([x509.DNSName("x;DNS=manager.internal")])
        assert await statuses(target, forged) == (UNAUTHENTICATED, UNAUTHENTICATED)


async def test_the_audit_log_has_the_clients_address(envoy: tuple[str, str]) -> None:
    """Behind Envoy, an entry contains the address of Envoy's client, whatever that client claims.
    For a client on its own machine, Envoy reports the machine's address."""
    target, _ = envoy
    forged = (("x-forwarded-for", "203.0.113.7"),)
    async with channel_to(target, "operator") as channel:
        stub: Any = audit_pb_grpc.AuditServiceStub(channel)

        async def addresses() -> set[str]:
            request = audit_pb.AuditServiceListRequest(method="/latchkey.v1.AuditService/List")
            page = await stub.List(request, timeout=WAIT_SECONDS, metadata=forged)
            return {entry.client_address for entry in page.entries}

        async def is_there() -> bool:
            return bool(await addresses())

        await eventually(is_there, "an entry is there")
        (address,) = await addresses()
        assert ip_address(address) != ip_address("203.0.113.7")


async def test_a_watch_behind_envoy(envoy: tuple[str, str]) -> None:
    """A Watch through Envoy receives grants for as long as its client requests them."""
    target, _ = envoy
    async with channel_to(target, "verifier") as channel:
        method: Any = pb_grpc.TokenServiceStub(channel).Watch
        stream = method(timeout=20)
        applied: dict[str, Any] = {}
        for number in range(1, 4):
            await stream.write(pb.WatchRequest(number=number, **applied))
            while True:
                answer = await stream.read()
                assert answer is not grpc.aio.EOF
                if answer.WhichOneof("event") == "grant":
                    break
                applied = position_of(answer)
            assert answer.grant.number == number
        stream.cancel()


def position_of(answer: Any) -> dict[str, Any]:
    """Return the fields that confirm a Reset."""
    return {"applied_revision": answer.reset.revision, "mark": answer.reset.mark}


async def test_bypassing_envoy(envoy: tuple[str, str]) -> None:
    """On the socket behind Envoy a caller is identified only by a header in Envoy's form."""
    _, address = envoy
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub = pb_grpc.TokenServiceStub(channel)
        for metadata in ((), (("x-forwarded-client-cert", f"URI={uri('verifier')}"),)):
            found = await outcome(
                stub.Verify(pb.VerifyRequest(secret="x"), timeout=5, metadata=metadata)
            )
            assert found.code is UNAUTHENTICATED


async def test_routed_methods(envoy: tuple[str, str]) -> None:
    """Envoy forwards Latchkey's own methods and health, and nothing else: no reflection."""
    target, _ = envoy
    async with channel_to(target, "verifier") as channel:
        method: Any = channel.unary_unary("/grpc.reflection.v1alpha.ServerReflection/x")
        found = await outcome(asyncio.ensure_future(method(b"", timeout=5)))
        assert found.code is grpc.StatusCode.UNIMPLEMENTED


async def test_limits_of_messages(envoy: tuple[str, str]) -> None:
    """Envoy forwards a message of the maximum size. It rejects larger and compressed ones, which
    Latchkey would read before rejecting them."""
    target, _ = envoy
    async with channel_to(target, "verifier") as channel:
        method: Any = channel.unary_unary("/latchkey.v1.TokenService/Verify")

        async def found(size: int, **more: Any) -> grpc.StatusCode:
            # An unknown field.
            filler = b"\xfa\x07" + _varint(size - 6) + bytes(size - 6)
            return (await outcome(method(filler, timeout=10, **more))).code

        assert await found(MESSAGE_BYTES_MAX) is OK
        # HTTP's 413, which Envoy does not map to a gRPC status.
        assert await found(MESSAGE_BYTES_MAX + 1) is grpc.StatusCode.UNKNOWN
        gzip = grpc.Compression.Gzip
        assert await found(10_000, compression=gzip) is grpc.StatusCode.UNIMPLEMENTED
        assert await found(10_000) is OK


async def test_limits_of_connections(envoy: tuple[str, str]) -> None:
    """Envoy announces to clients how many concurrent calls a connection may have. A gRPC client
    holds back further calls, and Envoy opens as many connections to Latchkey as its limit
    requires."""
    target, _ = envoy
    async with channel_to(target, "verifier") as channel:
        method: Any = pb_grpc.TokenServiceStub(channel).Watch
        streams = [method(timeout=20) for _ in range(STREAMS_MAX)]
        for stream in streams:
            await stream.write(pb.WatchRequest(number=1))
        for stream in streams:
            assert await stream.read() is not grpc.aio.EOF
        late = asyncio.ensure_future(
            outcome(
                pb_grpc.TokenServiceStub(channel).Verify(pb.VerifyRequest(secret="x"), timeout=20)
            )
        )
        async with channel_to(target, "verifier") as other:
            stub = pb_grpc.TokenServiceStub(other)
            assert (await outcome(stub.Verify(pb.VerifyRequest(secret="x"), timeout=5))).code is OK
        assert not late.done()
        for stream in streams:
            stream.cancel()
        assert (await late).code is OK


def tls_of(who: str, folder: Path) -> ssl.SSLContext:
    """Return what a caller needs for a raw connection to Envoy."""
    identity = spiffe_identity(uri(who))
    (folder / "caller.pem").write_bytes(identity.certificate + identity.key)
    context = ssl.create_default_context(cadata=ca_pem().decode())
    context.load_cert_chain(folder / "caller.pem")
    context.set_alpn_protocols(["h2"])
    return context


def one_call(block: bytes) -> list[Frame]:
    """A call with these headers, in as many frames as they need."""
    parts = [block[at : at + 16_000] for at in range(0, len(block), 16_000)]
    kinds = [http2.HEADERS, *[http2.CONTINUATION] * (len(parts) - 1)]
    flags = [*[0] * (len(parts) - 1), http2.END_HEADERS]
    return [
        *(Frame(k, f, 1, part) for k, f, part in zip(kinds, flags, parts, strict=True)),
        Frame(http2.DATA, http2.END_STREAM, 1, http2.message(b"")),
    ]


def taken_back(count: int) -> list[Frame]:
    """Many calls that are cancelled at once, and one that is not."""
    block = http2.headers(VERIFY)
    sent = []
    for stream in range(1, 2 * count, 2):
        sent += [
            Frame(http2.HEADERS, http2.END_HEADERS, stream, block),
            Frame(http2.RST_STREAM, 0, stream, b"\0\0\0\x08"),
        ]
    return [*sent, *(frame._replace(stream=2 * count + 1) for frame in one_call(block))]


@pytest.mark.parametrize(
    "call",
    [
        one_call(http2.headers(f"{VERIFY}\xff")),
        one_call(http2.headers(f"{VERIFY}?\xff")),
        one_call(http2.headers(VERIFY, authority="\xff")),
        one_call(http2.headers(VERIFY, ("x-request-id", "\xff"), ("authorization", "Bearer \xff"))),
        one_call(http2.headers(VERIFY, ("content-length", "99"))),
        one_call(
            http2.headers(VERIFY, ("grpc-timeout", "x"), ("grpc-encoding", "x"), ("x-bin", "\xff"))
        ),
        one_call(http2.headers(VERIFY, ("x-long", "x" * 55_000))),
        one_call(http2.headers(VERIFY, *[(f"x-{number}", "x" * 700) for number in range(70)])),
        taken_back(200),
    ],
    ids=["path", "query", "authority", "text", "length", "grpc", "long", "many", "taken back"],
)
async def test_one_callers_frames_end_no_other_stream(
    envoy: tuple[str, str], call: list[Frame], tmp_path: Path
) -> None:
    """Latchkey closes connections that receive such frames, and no other caller's calls end."""
    target, _ = envoy
    context = tls_of("manager", tmp_path)
    async with channel_to(target, "verifier") as channel:
        stream = pb_grpc.TokenServiceStub(channel).Watch()
        await stream.write(pb.WatchRequest(number=1))
        reset: Any = await stream.read()
        assert reset is not grpc.aio.EOF
        async with connected(target, tls=context) as connection:
            await connection.exchange(Frame(http2.SETTINGS, 0, 0), *call)
        await stream.write(pb.WatchRequest(number=2, **position_of(reset)))
        answer: Any
        async with asyncio.timeout(WAIT_SECONDS):
            while (answer := await stream.read()) is not grpc.aio.EOF:
                if answer.grant.number == 2:
                    break
        assert answer is not grpc.aio.EOF, "the stream was ended"
        stream.cancel()
