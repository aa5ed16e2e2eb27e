"""The load on the service: calls of every kind, at fixed rates, with every answer checked."""

import asyncio
import collections
import contextlib
import json
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import latchkey
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from latchkey_proto.v1 import audit_service_pb2 as audit_pb
from latchkey_proto.v1 import audit_service_pb2_grpc as audit_grpc
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import status_service_pb2_grpc as status_grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.secret_format import Keyring

from tests.helpers.callers import (
    CALLERS,
    ca_pem,
    channel_credentials,
    credential,
    policy_text,
    spiffe_identity,
    uri,
)
from tests.helpers.child_processes import Child
from tests.helpers.token_feed import Board
from tests.helpers.waiting import eventually
from tests.helpers.watch_client import WatchClient

__all__ = ["Load", "Place", "Tally", "loading"]

# Permanent tokens, and the number of accounts of the temporary ones, which keeps Lists at one
# length.
LIVE = 200
LIVE_ACCOUNT = "resident"
ACCOUNTS = 50
# Permanent channels, each with a separate connection: enough for both workers to get some.
CHANNELS = 8
CALL_SECONDS = 10.0
# Every operation ends within this time, or it is an error.
ACT_SECONDS_MAX = 40.0
# Concurrent operations of one kind. Operations beyond that are skipped and counted.
UNDER_WAY_MAX = 100
# Between a Create and its Delete: verifiers have cached the token by then.
LIFE_SECONDS = 0.5
CLIENTS = 2
# The caller that is added to the policy and removed from it.
GUEST = "acmes-operator"
POLICY_SECONDS_MAX = 5.0
REFUSED = frozenset({pb.VERDICT_DELETED, pb.VERDICT_UNKNOWN})

# A separate connection for each channel. A connection attempt (which the option limits, despite its
# name) may take as long as a call, because a briefly busy machine is not a fault.
_CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.min_reconnect_backoff_ms", int(CALL_SECONDS * 1000)),
)

Metadata = tuple[tuple[str, str], ...]


class WrongAnswer(Exception):
    """An answer that must not occur."""


@dataclass(frozen=True)
class Place:
    """The service's address and files."""

    address: str
    tls_address: str
    pid: int
    keyring: Keyring
    policy: Path
    folder: Path


@dataclass
class Tally:
    """The outcomes of operations, by kind, and the unexpected ones."""

    done: collections.Counter[str] = field(default_factory=collections.Counter)
    left_out: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: collections.Counter[str] = field(default_factory=collections.Counter)
    unexpected: collections.Counter[str] = field(default_factory=collections.Counter)


def bearer(name: str) -> Metadata:
    return (("authorization", f"Bearer {credential(name)}"),)


class Load:
    """Callers of all kinds. Created by `loading`, which also ends everything that they started."""

    def __init__(self, place: Place, scale: float) -> None:
        self.tally = Tally()
        self._place = place
        self._scale = scale
        self._random = random.Random()  # noqa: S311 - a spread
        self._numbers = iter(range(10**9))
        self._live: list[str] = []
        self._channels: list[grpc.aio.Channel] = []
        self._stubs: list[Any] = []
        self._board = Board(place.folder / "board")
        self._clients: list[Child] = []
        self._underway: set[asyncio.Task[None]] = set()
        # The test covers the handshake, and not the generation of a key.
        self._credentials = {
            name: channel_credentials(spiffe_identity(uri(name))) for name in CALLERS
        }
        self._guest_is_in = True
        # Each change of the policy is in force before the next one is made.
        self._policy_changes = asyncio.Lock()

    @property
    def kinds(self) -> dict[str, tuple[float, Callable[[], Awaitable[None]]]]:
        """The rate of each kind, per second on average. Together they cause 700 calls a second, a
        third of two cores: so the service is neither idle nor overloaded."""
        return {
            "verify live": (24.0, self._verify_live),
            "verify missing": (30.0, self._verify_missing),
            "verify made up": (30.0, self._verify_made_up),
            "batch": (6.0, self._batch),
            "create to delete": (18.0, self._lifecycle),
            "list": (6.0, self._list),
            "channel opens": (6.0, self._channel),
            "broken connection": (3.0, self._broken_connection),
            "watch breaks": (4.5, self._watch),
            "health watch breaks": (1.5, self._health_watch),
            "library client": (1.5, self._library),
            "client process": (0.1, self._client_process),
            "TLS caller": (4.5, self._tls),
            "denied": (6.0, self._denied),
            "policy changes": (0.1, self._policy),
            "audit": (1.5, self._audit),
            "status": (0.6, self._status),
            "reflection": (0.9, self._reflection),
            "cancelled": (9.0, self._cancelled),
            "tiny deadline": (9.0, self._tiny_deadline),
        }

    async def prepare(self) -> None:
        """Create the permanent tokens."""
        for _ in range(CHANNELS):
            channel = grpc.aio.insecure_channel(self._place.address, options=_CHANNEL_OPTIONS)
            self._channels.append(channel)
            self._stubs.append(pb_grpc.TokenServiceStub(channel))
        for number in range(LIVE):
            self._live.append((await self._create(LIVE_ACCOUNT, f"live {number}")).secret)
        (self._place.folder / "live").write_text("\n".join(self._live))

    async def run(self) -> None:
        """Start operations of each kind at its rate, at random moments. Ends when cancelled."""
        async with asyncio.TaskGroup() as group:
            for kind, (rate, act) in self.kinds.items():
                group.create_task(self._keep_at(kind, rate * self._scale, act))

    async def ask_anyone(self) -> None:
        """Make a call over a new connection, which reaches a random one of the workers that share
        an address."""
        async with self._fresh_channel() as channel:
            await self._verify(pb_grpc.TokenServiceStub(channel), "")

    async def wait(self) -> None:
        """Wait for operations in progress, and end the client processes in order."""
        if self._underway:
            # Each has its own bound.
            await asyncio.wait(set(self._underway))
        for client in self._clients:
            client.ask_to_end()
        for client in self._clients:
            try:
                await client.ended()
            except AssertionError as error:
                self.tally.unexpected[f"client process: {error}"] += 1
                client.clean_up()
            self._heed(client)

    async def close(self) -> None:
        """Close the channels."""
        for channel in self._channels:
            await channel.close()
        self._board.close()

    def clean_up(self) -> None:
        for client in self._clients:
            client.clean_up()

    async def _keep_at(self, kind: str, rate: float, act: Callable[[], Awaitable[None]]) -> None:
        running = 0

        async def once() -> None:
            nonlocal running
            running += 1
            try:
                async with asyncio.timeout(ACT_SECONDS_MAX):
                    await act()
                self.tally.done[kind] += 1
            except WrongAnswer as error:
                self.tally.wrong[f"{kind}: {error}"] += 1
            except grpc.aio.AioRpcError as error:
                self.tally.unexpected[f"{kind}: {error.code().name}: {error.details()}"] += 1
            except Exception as error:  # noqa: BLE001 - every exception is a finding
                self.tally.unexpected[f"{kind}: {type(error).__name__}: {error}"] += 1
            finally:
                running -= 1

        # The first operation of each kind starts soon, even if the kind is rare.
        pause = self._random.uniform(0.0, 1.0)
        while True:
            await asyncio.sleep(pause)
            pause = self._random.expovariate(rate)
            if running >= UNDER_WAY_MAX:
                self.tally.left_out[kind] += 1
                continue
            task = asyncio.create_task(once(), name=f"soak {kind}")
            self._underway.add(task)
            task.add_done_callback(self._underway.discard)

    # Verifies.

    async def _verify_live(self) -> None:
        stub = self._stub()
        secrets = self._random.sample(self._live, 10)
        for verdict in await asyncio.gather(*(self._verify(stub, secret) for secret in secrets)):
            _is(verdict, pb.VERDICT_VALID, "a live token")

    async def _verify_missing(self) -> None:
        _is(await self._verify(self._stub(), self._missing()), pb.VERDICT_UNKNOWN, "nobody's")

    async def _verify_made_up(self) -> None:
        secret = self._missing()
        mistyped = secret[:-1] + ("0" if secret[-1] != "0" else "1")
        for made_up in (mistyped, "", "x" * 10_000, "ключ"):
            _is(await self._verify(self._stub(), made_up), pb.VERDICT_MALFORMED, "made up")

    async def _batch(self) -> None:
        live = self._random.sample(self._live, 40)
        secrets = [*live, *(self._missing() for _ in range(10)), "nothing"]
        request = pb.BatchVerifyRequest(requests=[pb.VerifyRequest(secret=s) for s in secrets])
        answer = await self._stub().BatchVerify(
            request, timeout=CALL_SECONDS, metadata=bearer("verifier")
        )
        verdicts = [response.verdict for response in answer.responses]
        expected = [
            *[pb.VERDICT_VALID] * 40,
            *[pb.VERDICT_UNKNOWN] * 10,
            pb.VERDICT_MALFORMED,
        ]
        _is(verdicts, expected, "a batch")

    # Tokens.

    async def _lifecycle(self) -> None:
        number = next(self._numbers)
        account = f"account-{number % ACCOUNTS}"
        created = await self._create(account, f"token {number}")
        token_id, secret = created.token.id, created.secret
        self._board.created(number, secret)
        stub = self._stub()
        got = await stub.Get(
            pb.GetRequest(account_id=account, id=token_id),
            timeout=CALL_SECONDS,
            metadata=bearer("manager"),
        )
        _is(got.token.id, token_id, "what was created")
        for each in self._stubs:
            _is(await self._verify(each, secret), pb.VERDICT_VALID, "a new token")
        await asyncio.sleep(LIFE_SECONDS)
        request = pb.DeleteRequest(account_id=account, id=token_id)
        answer = await stub.Delete(request, timeout=CALL_SECONDS, metadata=bearer("manager"))
        self._board.deleted(number)
        if not answer.receipt.HasField("effective_time"):
            raise WrongAnswer("a Delete that waits has no effective time")
        verdicts = await asyncio.gather(*(self._verify(each, secret) for each in self._stubs))
        if not REFUSED.issuperset(verdicts):
            raise WrongAnswer(f"{verdicts} for a token whose Delete has answered")

    async def _list(self) -> None:
        request = pb.ListRequest(account_id=LIVE_ACCOUNT, page_size=LIVE // 2)
        seen: set[str] = set()
        while True:
            answer = await self._stub().List(
                request, timeout=CALL_SECONDS, metadata=bearer("manager")
            )
            seen |= {token.id for token in answer.tokens}
            if not answer.next_page_token:
                break
            request.page_token = answer.next_page_token
        _is(len(seen), LIVE, "tokens in the list")

    # Connections and streams that open and close.

    async def _channel(self) -> None:
        async with self._fresh_channel() as channel:
            stub = pb_grpc.TokenServiceStub(channel)
            _is(
                await self._verify(stub, self._random.choice(self._live)),
                pb.VERDICT_VALID,
                "a live token",
            )

    async def _broken_connection(self) -> None:
        """A connection that ends in the middle of a message."""
        host, _, port = self._place.address.rpartition(":")
        begun = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(begun[: self._random.randint(0, len(begun))])
        await writer.drain()
        if self._random.random() < 0.5:
            # With a reset.
            writer.transport.abort()
        else:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        del reader

    async def _watch(self) -> None:
        async with self._fresh_channel() as channel:
            client = WatchClient(pb_grpc.TokenServiceStub(channel), bearer("verifier"))
            for _ in range(self._random.randint(0, 3)):
                await client.granted()
                await asyncio.sleep(self._random.uniform(0.0, 0.3))
            match self._random.randrange(4):
                case 0:
                    await client.say(released=True)
                    await client.call.done_writing()
                    await client.refusal()
                case 1:
                    # Without a release: the server waits until its grant has expired.
                    await client.call.done_writing()
                case 2:
                    client.call.cancel()
                case 3:
                    pass  # The channel closes under it.

    async def _health_watch(self) -> None:
        async with self._fresh_channel() as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            call = stub.Watch(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS)
            answer = await call.read()
            _is(answer.status, health_pb2.HealthCheckResponse.SERVING, "health")
            if self._random.random() < 0.5:
                call.cancel()

    async def _library(self) -> None:
        """A client of the library in this process, with a certificate or a credential."""
        access = latchkey.Access(credential=credential("verifier"))
        target = self._place.address
        if self._random.random() < 0.5:
            target = self._place.tls_address
            access = latchkey.Access(**self._tls_files())
        async with (
            latchkey.Client(target, access=access) as client,
            latchkey.Verifier(client, timeout_seconds=CALL_SECONDS) as verifier,
        ):
            for secret in self._random.sample(self._live, 3):
                answer = await verifier.verify(secret, latchkey.Scope.READ)
                _is(answer.verdict, latchkey.Verdict.VALID, "a live token")
            await asyncio.sleep(self._random.uniform(0.0, 2.0))

    async def _client_process(self) -> None:
        """End one library process, with a shutdown or a kill, and start another one."""
        if len(self._clients) >= CLIENTS:
            client = self._clients.pop(0)
            try:
                if self._random.random() < 0.5:
                    client.kill()
                else:
                    client.ask_to_end()
                await client.ended()
                self._heed(client)
            finally:
                client.clean_up()
        options = {
            "target": self._place.address,
            "live": str(self._place.folder / "live"),
            "board": str(self._place.folder / "board"),
        }
        name = f"client-{next(self._numbers)}"
        environment = {"LATCHKEY_CREDENTIAL": credential("verifier")}
        argv = ["tests.soak.client", json.dumps(options)]
        self._clients.append(Child(self._place.folder, name, argv, environment))

    def _heed(self, client: Child) -> None:
        """Record the output of a client that has ended."""
        if trouble := client.trouble():
            self.tally.unexpected[f"client process: {trouble}"] += 1
        for line in client.err.read_text("utf-8", "replace").splitlines():
            kind = self.tally.wrong if line.startswith("wrong: ") else self.tally.unexpected
            kind[f"client process: {line}"] += 1
        client.out.unlink()
        client.err.unlink()

    # Callers and the policy.

    async def _tls(self) -> None:
        name = self._random.choice(("verifier", "manager", "operator"))
        async with self._fresh_channel(name) as channel:
            stub = pb_grpc.TokenServiceStub(channel)
            verify = stub.Verify(
                pb.VerifyRequest(secret=self._random.choice(self._live)), timeout=CALL_SECONDS
            )
            if name == "verifier":
                _is((await verify).verdict, pb.VERDICT_VALID, "a live token")
                return
            await _ends(verify, grpc.StatusCode.PERMISSION_DENIED)

    async def _denied(self) -> None:
        stub = self._stub()
        secret = self._random.choice(self._live)
        verify = stub.Verify(pb.VerifyRequest(secret=secret), timeout=CALL_SECONDS)
        await _ends(verify, grpc.StatusCode.UNAUTHENTICATED)
        request = pb.ListRequest(account_id=LIVE_ACCOUNT)
        for who in ("verifier", "acmes-manager"):
            call = stub.List(request, timeout=CALL_SECONDS, metadata=bearer(who))
            await _ends(call, grpc.StatusCode.PERMISSION_DENIED)

    async def _policy(self) -> None:
        """Add or remove the guest, and check that each worker soon applies that."""
        async with self._policy_changes:
            await self._change_policy()

    async def _change_policy(self) -> None:
        self._guest_is_in = not self._guest_is_in
        names = [name for name in CALLERS if name != GUEST or self._guest_is_in]
        new = self._place.policy.with_suffix(".new")
        new.write_text(policy_text(names))
        new.replace(self._place.policy)
        os.kill(self._place.pid, signal.SIGHUP)
        expected = (
            grpc.StatusCode.PERMISSION_DENIED
            if self._guest_is_in
            else grpc.StatusCode.UNAUTHENTICATED
        )

        async def heard() -> bool:
            for stub in self._stubs:
                request = pb.ListRequest(account_id=LIVE_ACCOUNT)
                await _ends(
                    stub.List(request, timeout=CALL_SECONDS, metadata=bearer(GUEST)), expected
                )
            return True

        async def heard_by_all() -> bool:
            with contextlib.suppress(WrongAnswer):
                return await heard()
            return False

        await eventually(heard_by_all, "the policy is in force", POLICY_SECONDS_MAX)

    async def _audit(self) -> None:
        stub: Any = audit_grpc.AuditServiceStub(self._random.choice(self._channels))
        request = audit_pb.AuditServiceListRequest(account_id=LIVE_ACCOUNT, page_size=100)
        for _ in range(2):
            answer = await stub.List(request, timeout=CALL_SECONDS, metadata=bearer("operator"))
            _is(len(answer.entries), 100, "audit entries")
            request.page_token = answer.next_page_token

    async def _status(self) -> None:
        stub: Any = status_grpc.StatusServiceStub(self._random.choice(self._channels))
        await stub.GetStatus(
            status_pb.GetStatusRequest(), timeout=CALL_SECONDS, metadata=bearer("operator")
        )

    async def _reflection(self) -> None:
        """The calls that grpcurl makes."""
        name = "latchkey.v1.TokenService"
        asked = reflection_pb2.ServerReflectionRequest
        async with self._fresh_channel() as channel:
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]  # its stubs are for the other API
            call = stub.ServerReflectionInfo(timeout=CALL_SECONDS)
            await call.write(asked(list_services="*"))
            listed = (await call.read()).list_services_response.service
            if name not in {service.name for service in listed}:
                raise WrongAnswer("reflection does not list TokenService")
            await call.write(asked(file_containing_symbol=name))
            if not (await call.read()).file_descriptor_response.file_descriptor_proto:
                raise WrongAnswer("reflection has no file for TokenService")
            await call.done_writing()

    # Callers that do not wait.

    async def _cancelled(self) -> None:
        call = self._any_call(CALL_SECONDS)
        await asyncio.sleep(self._random.uniform(0.0, 0.004))
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call

    async def _tiny_deadline(self) -> None:
        call = self._any_call(self._random.choice((0.0005, 0.001, 0.002, 0.005)))
        with contextlib.suppress(grpc.aio.AioRpcError):
            await call
        code = await call.code()
        # The last of these is rejected by a client that foresees that its deadline will pass.
        if code not in (grpc.StatusCode.OK, *UNANSWERED):
            raise WrongAnswer(f"{code.name} for a tiny deadline")

    def _any_call(self, seconds: float) -> Any:
        stub = self._stub()
        if self._random.random() < 0.5:
            request = pb.VerifyRequest(secret=self._missing())
            return stub.Verify(request, timeout=seconds, metadata=bearer("verifier"))
        return stub.List(
            pb.ListRequest(account_id=LIVE_ACCOUNT),
            timeout=seconds,
            metadata=bearer("manager"),
        )

    # Helpers.

    def _stub(self) -> Any:
        return self._random.choice(self._stubs)

    def _missing(self) -> str:
        """Return a secret that only the database can identify as unknown."""
        return self._place.keyring.mint("lk", os.urandom).secret.reveal()

    async def _create(self, account: str, name: str) -> pb.CreateResponse:
        request = pb.CreateRequest(account_id=account, name=name, scope=pb.SCOPE_READ)
        answer: pb.CreateResponse = await self._stub().Create(
            request, timeout=CALL_SECONDS, metadata=bearer("manager")
        )
        return answer

    async def _verify(self, stub: Any, secret: str) -> int:
        answer = await stub.Verify(
            pb.VerifyRequest(secret=secret), timeout=CALL_SECONDS, metadata=bearer("verifier")
        )
        return int(answer.verdict)

    @contextlib.asynccontextmanager
    async def _fresh_channel(self, name: str | None = None) -> AsyncIterator[grpc.aio.Channel]:
        """Return a new channel, with this caller's certificate, or in plaintext."""
        if name is None:
            made = grpc.aio.insecure_channel(self._place.address, options=_CHANNEL_OPTIONS)
        else:
            made = grpc.aio.secure_channel(
                self._place.tls_address, self._credentials[name], options=_CHANNEL_OPTIONS
            )
        async with made as channel:
            yield channel

    def _tls_files(self) -> dict[str, Any]:
        folder = self._place.folder
        files = {name: folder / f"{name}.pem" for name in ("tls_ca", "tls_certificate", "tls_key")}
        if not files["tls_ca"].exists():
            identity = spiffe_identity(uri("verifier"))
            files["tls_certificate"].write_bytes(identity.certificate)
            files["tls_key"].write_bytes(identity.key)
            files["tls_ca"].write_bytes(ca_pem())
        return files


@contextlib.asynccontextmanager
async def loading(place: Place, scale: float = 1.0) -> AsyncIterator[Load]:
    """Yield a prepared load, and end everything that it starts."""
    load = Load(place, scale)
    try:
        await load.prepare()
        yield load
    finally:
        load.clean_up()


def _is(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise WrongAnswer(f"{found}, not {expected}, for {what}")


# The server is too busy, which fails a soak, but it has given no answer.
UNANSWERED = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)


async def _ends(call: Any, *codes: grpc.StatusCode) -> None:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        if error.code() in UNANSWERED and error.code() not in codes:
            raise
    code = await call.code()
    if code not in codes:
        raise WrongAnswer(f"{code.name}, not {' or '.join(c.name for c in codes)}")
