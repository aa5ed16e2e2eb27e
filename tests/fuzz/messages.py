"""Every method's message, sent to a real server with a real listener and Postgres.

The server runs in this process, so that new paths through it guide the fuzzer. Its event loop runs
only while an input is answered. An input is one byte for the method and its message; for a stream,
several messages, each after one byte for its length.
"""

import asyncio
import base64
import os
import random
import re
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import uvloop
from google.protobuf import duration_pb2, timestamp_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from latchkey_proto.v1 import audit_service_pb2 as audit_pb
from latchkey_proto.v1 import maintenance_service_pb2 as maintenance_pb
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_service.audit.audit_table import Filter
from latchkey_service.process.server import Server
from latchkey_service.process.wiring import running
from latchkey_service.rpc.non_utf8_parsing import parse_non_utf8
from latchkey_service.secret_format import Keyring
from latchkey_service.settings import logs
from latchkey_service.settings.settings import Settings
from latchkey_service.tokens import page_tokens

from tests.fuzz import fresh, protobuf
from tests.fuzz.fresh import NARROWING, Fresh
from tests.fuzz.methods import (
    ENDLESS,
    HEALTH,
    METHODS,
    REFLECTION,
    TOKENS,
    Method,
    input_of,
    number_of,
    parts_of,
)
from tests.fuzz.surroundings import ACCOUNT, DELETED, DELETED_ID, LIVE, LIVE_ID, PEPPER
from tests.fuzz.target import Finding, Target

OTHER_ACCOUNT = "globex"
# Placeholder for the ID of the newest token, of the same length.
FRESH_ID, FRESH_SECRET = "tok_" + "9" * 26, "fuzz_" + "9" * 57
SECRETS = {name: minted.secret.reveal() for name, minted in (("live", LIVE), ("deleted", DELETED))}
MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
WORDS = (
    ACCOUNT, "globex:eu", *SECRETS.values(), FRESH_SECRET, LIVE_ID, DELETED_ID, FRESH_ID,
    LIVE.digest.value.hex(), base64.b64encode(LIVE.digest.value).decode(), "token 0",
    page_tokens.encode(ACCOUNT, MOMENT, LIVE_ID),
    page_tokens.encode(repr(Filter("", "", "", "", 0, None, None)), MOMENT, "3"),
    "Create", f"{TOKENS}List", "latchkey.v1.TokenService", "grpc.health.v1.Health",
    "latchkey/v1/token_service.proto", "google.protobuf.Timestamp",
)  # fmt: skip
CALL_SECONDS_MAX = 15.0
# Statuses for an invalid request. Any other status is a fault of the server.
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    # Only for a sixth secret.
    grpc.StatusCode.FAILED_PRECONDITION,
}
TOO_MANY = "secrets that work"
VERIFY = METHODS[number_of("TokenService/Verify")]
# Allowed occasionally, for example when a lease has just expired, but not every time for the same
# input.
PASSING = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}
TRIES = 4
# Number of inputs between two checks that other clients are still served.
LOOK_EVERY = 200
TASKS_MAX = 200
_TRACES = re.compile(rb"Traceback|site-packages|asyncpg|\.py\b|Error: |SELECT |INSERT ")


class Answer(NamedTuple):
    """The outcome of a call: status, and its metadata."""

    code: grpc.StatusCode
    message: str
    metadata: list[tuple[str, str | bytes]]
    responses: list[bytes]


class Messages(Target):
    """A server with one transport, and two clients: one attacks, one must be served."""

    length_max = 8_192
    mutates = True

    def __init__(self, transport: str) -> None:
        logs.configure("json", "error")
        # Channels, whose type annotations do not cover calls with raw bytes.
        self._channel: Any = None
        self._other: Any = None
        self._loop = uvloop.new_event_loop()
        asyncio.set_event_loop(self._loop)
        self._inputs = 0
        self._fresh: Fresh | None = None
        self._run(self._start(transport))

    def seeds(self) -> Iterable[bytes]:
        live, deleted = SECRETS["live"], SECRETS["deleted"]
        good: list[tuple[str, Message]] = [
            ("Verify", pb.VerifyRequest(secret=live, required_scope=pb.SCOPE_READ)),
            ("Verify", pb.VerifyRequest(secret=live, required_scope=pb.SCOPE_WRITE)),
            ("Verify", pb.VerifyRequest(secret=deleted)),
            ("Verify", pb.VerifyRequest(secret=FRESH_SECRET)),
            (
                "BatchVerify",
                pb.BatchVerifyRequest(
                    requests=[pb.VerifyRequest(secret=s) for s in (live, deleted, "x", live)]
                ),
            ),
            ("Create", pb.CreateRequest(account_id=ACCOUNT, name="a", scope=pb.SCOPE_READ)),
            (
                "Create",
                pb.CreateRequest(
                    account_id=ACCOUNT,
                    name="b",
                    scope=pb.SCOPE_WRITE,
                    ttl=duration_pb2.Duration(seconds=3600),
                    labels={"team": "x", "b": ""},
                ),
            ),
            (
                "Create",
                pb.CreateRequest(
                    account_id=OTHER_ACCOUNT,
                    name=live,
                    scope=pb.SCOPE_READ,
                    expire_time=timestamp_pb2.Timestamp(seconds=4102444800),
                ),
            ),
            ("Get", pb.GetRequest(account_id=ACCOUNT, id=LIVE_ID)),
            ("TokenService/List", pb.ListRequest(account_id=ACCOUNT, page_size=2)),
            (
                "TokenService/List",
                pb.ListRequest(
                    account_id=ACCOUNT,
                    page_token=page_tokens.encode(ACCOUNT, MOMENT, LIVE_ID),
                ),
            ),
            ("Delete", pb.DeleteRequest(account_id=ACCOUNT, id=FRESH_ID)),
            *fresh.seeds(ACCOUNT, OTHER_ACCOUNT, FRESH_ID, FRESH_SECRET),
            ("Delete", pb.DeleteRequest(account_id=ACCOUNT, id=DELETED_ID, no_wait=True)),
            ("GetStatus", status_pb.GetStatusRequest()),
            ("InvalidateAll", maintenance_pb.InvalidateAllRequest()),
            (
                "AuditService/List",
                audit_pb.AuditServiceListRequest(
                    account_id=ACCOUNT,
                    method="Create",
                    outcome=audit_pb.OUTCOME_OK,
                    start_time=timestamp_pb2.Timestamp(seconds=1),
                    end_time=timestamp_pb2.Timestamp(seconds=253402300799, nanos=999999999),
                    page_size=3,
                ),
            ),
            ("Check", health_pb2.HealthCheckRequest(service="latchkey.v1.TokenService")),
            ("Health/Watch", health_pb2.HealthCheckRequest()),
        ]
        for name, message in good:
            yield input_of(number_of(name), [message.SerializeToString()])
        watch = [
            pb.WatchRequest(applied_revision=0, number=1),
            pb.WatchRequest(applied_revision=1, number=2),
            pb.WatchRequest(number=3, released=True),
        ]
        yield input_of(number_of("TokenService/Watch"), [m.SerializeToString() for m in watch])
        ask = reflection_pb2.ServerReflectionRequest
        reflect: list[Message] = [
            ask(list_services=""),
            ask(file_containing_symbol="latchkey.v1.TokenService"),
            ask(file_by_filename="latchkey/v1/token_service.proto"),
            ask(
                file_containing_extension=reflection_pb2.ExtensionRequest(
                    containing_type="google.protobuf.FileOptions", extension_number=1042
                )
            ),
            ask(all_extension_numbers_of_type="google.protobuf.FileOptions"),
        ]
        yield input_of(number_of("ServerReflectionInfo"), [m.SerializeToString() for m in reflect])

    def mutate(self, data: bytes, length_max: int, chance: random.Random) -> bytes:
        number = data[0] % len(METHODS)
        if chance.random() < 0.05:
            number = chance.randrange(len(METHODS))
        method = METHODS[number]
        parts = parts_of(method, data[1:])
        place = chance.randrange(len(parts)) if parts else 0
        if method.requests and chance.random() < 0.3:
            # Streams: one message more, one less, or another order.
            parts[place:place] = parts[place : place + 1] or [b""]
            if chance.random() < 0.5:
                chance.shuffle(parts)
            return input_of(number, parts)
        try:
            message = method.request.FromString(parts[place] if parts else b"")
        except DecodeError:
            message = method.request()
        protobuf.change(message, WORDS, chance)
        changed = message.SerializeToString()
        if chance.random() < 0.1:
            # The whole input, except for one byte.
            at = chance.randint(0, len(changed))
            changed = changed[:at] + chance.randbytes(1) + changed[at + 1 :]
        parts[place : place + 1] = [changed]
        return input_of(number, parts)

    def one(self, data: bytes) -> None:
        if not data:
            return
        method = METHODS[data[0] % len(METHODS)]
        parts = parts_of(method, data[1:])
        if (new := self._fresh) is not None:
            for placeholder, value in ((FRESH_ID, new.id), (FRESH_SECRET, new.secret)):
                parts = [part.replace(placeholder.encode(), value.encode()) for part in parts]
        if method.path in NARROWING and any(
            text.encode() in parts[0] for text in (LIVE_ID, SECRETS["live"])
        ):
            # The other client needs this token.
            return
        if method.path == f"{TOKENS}DeleteAll" and ACCOUNT.encode() in parts[0]:
            return
        self._run(self._attack(method, parts))
        self._inputs += 1
        if self._inputs % LOOK_EVERY == 0:
            self._run(self._look())

    def _run(self, work: Any) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(work, CALL_SECONDS_MAX * TRIES))

    async def _start(self, transport: str) -> None:
        settings = Settings(
            database_url=os.environ["FUZZ_DATABASE_URL"],
            data_dir=Path("unused"),
            listen="127.0.0.1:0",
            transport=transport,
            secret_prefix="fuzz",
            # Deletes wait for the leases of Watches that end without a release.
            lease_seconds=0.4,
        )
        # It runs as long as this process, which libFuzzer ends.
        self._server = running(settings, Keyring([PEPPER]))
        server: Server = await self._server.__aenter__()
        options = (
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", -1),
        )
        self._channel, self._other = (
            grpc.aio.insecure_channel(server.address, options=options) for _ in range(2)
        )
        for _ in range(200):
            if await self._is_serving():
                return
            await asyncio.sleep(0.05)
        raise RuntimeError("the server does not come up")

    async def _is_serving(self) -> bool:
        answer = await self._other.unary_unary(f"{HEALTH}Check")(b"", timeout=CALL_SECONDS_MAX)
        return bool(
            health_pb2.HealthCheckResponse.FromString(answer).status
            == health_pb2.HealthCheckResponse.SERVING
        )

    async def _look(self) -> None:
        """Check that other clients are served, and that ended calls leave nothing behind."""
        if not await self._is_serving():
            raise Finding("the server has stopped serving")
        request = pb.VerifyRequest(secret=SECRETS["live"], required_scope=pb.SCOPE_READ)
        call = self._other.unary_unary(f"{TOKENS}Verify")
        answer = await call(request.SerializeToString(), timeout=CALL_SECONDS_MAX)
        if pb.VerifyResponse.FromString(answer).verdict != pb.VERDICT_VALID:
            raise Finding("a live token is refused")
        if (tasks := len(asyncio.all_tasks())) > TASKS_MAX:
            # Tasks of cancelled calls may take a moment.
            await asyncio.sleep(0.5)
            if (tasks := len(asyncio.all_tasks())) > TASKS_MAX:
                raise Finding(f"{tasks} tasks run")

    async def _attack(self, method: Method, parts: list[bytes]) -> None:
        for _ in range(TRIES):
            answer = await self._call(method, parts)
            _judge(method, parts, answer)
            if answer.code not in PASSING:
                break
            await asyncio.sleep(0.2)
        else:
            raise Finding(f"{method.path}: {answer.code.name}, {TRIES} times: {answer.message}")
        self._follow(method, parts, answer)
        if method.path in NARROWING and self._fresh is not None:
            # At once: a change that narrows is in effect when it is answered.
            for question in self._fresh.questions():
                found = await self._call(VERIFY, [question.SerializeToString()])
                if found.code not in PASSING:
                    self._follow(VERIFY, [question.SerializeToString()], found)

    async def _call(self, method: Method, parts: list[bytes]) -> Answer:
        responses: list[bytes] = []
        try:
            if not method.responses:
                call: Any = self._channel.unary_unary(method.path)(
                    parts[0], timeout=CALL_SECONDS_MAX
                )
                responses.append(await call)
            else:
                await self._stream(method, parts, responses)
        except grpc.aio.AioRpcError as error:
            if error.details() == "Internal error from Core" and method.requests:
                # grpcio's client reports this itself: it wrote after the server had ended the
                # stream.
                return Answer(grpc.StatusCode.OK, "", [], responses)
            metadata = [*(error.initial_metadata() or ()), *(error.trailing_metadata() or ())]
            return Answer(error.code(), error.details() or "", metadata, responses)
        return Answer(grpc.StatusCode.OK, "", [], responses)

    async def _stream(self, method: Method, parts: list[bytes], responses: list[bytes]) -> None:
        async def requests() -> AsyncIterator[bytes]:
            for part in parts:
                yield part

        if method.requests:
            call: Any = self._channel.stream_stream(method.path)(
                requests(), timeout=CALL_SECONDS_MAX
            )
        else:
            call = self._channel.unary_stream(method.path)(parts[0], timeout=CALL_SECONDS_MAX)
        try:
            async for response in call:
                responses.append(response)
                if method.path in ENDLESS and len(responses) > len(parts):
                    break
                if method.path == f"{HEALTH}Watch":
                    break
        finally:
            call.cancel()

    def _follow(self, method: Method, parts: list[bytes], answer: Answer) -> None:
        """Check an answer against the known tokens."""
        if method.requests:
            return
        try:
            request = method.request.FromString(parts[0])
        except DecodeError:
            request = parse_non_utf8(method.path, parts[0])
        if request is None:
            return
        if method.path == f"{TOKENS}Create" and answer.code is grpc.StatusCode.OK:
            created = pb.CreateResponse.FromString(answer.responses[0])
            if created.token.account_id in (ACCOUNT, OTHER_ACCOUNT):
                self._fresh = Fresh(created)
        elif self._fresh is not None and method.path in NARROWING | {f"{TOKENS}Enable"}:
            response = method.response.FromString(answer.responses[0]) if answer.responses else None
            self._fresh.learn(method.path, request, answer.code, response)
        elif method.path == f"{TOKENS}Verify":
            if answer.code is not grpc.StatusCode.OK:
                raise Finding(f"a Verify was answered {answer.code.name}")
            self._verdict(request, pb.VerifyResponse.FromString(answer.responses[0]))
        elif method.path == f"{TOKENS}BatchVerify" and 1 <= len(request.requests) <= 1_000:
            if answer.code is not grpc.StatusCode.OK:
                raise Finding(f"a BatchVerify was answered {answer.code.name}")
            response = pb.BatchVerifyResponse.FromString(answer.responses[0])
            for question, single in zip(request.requests, response.responses, strict=True):
                self._verdict(question, single)

    def _verdict(self, request: pb.VerifyRequest, response: pb.VerifyResponse) -> None:
        scope, verdict = request.required_scope, response.verdict
        allowed = {pb.VERDICT_MALFORMED, pb.VERDICT_UNKNOWN}
        if request.secret == SECRETS["live"]:
            # It has the scope READ, no permissions and no networks.
            granted = scope in (pb.SCOPE_UNSPECIFIED, pb.SCOPE_READ)
            if not granted:
                allowed = {pb.VERDICT_INSUFFICIENT_SCOPE}
            elif request.required_permissions:
                allowed = {pb.VERDICT_INSUFFICIENT_PERMISSIONS}
            else:
                allowed = {pb.VERDICT_VALID}
        elif request.secret == SECRETS["deleted"]:
            allowed = {pb.VERDICT_DELETED}
        elif (new := self._fresh) is not None and request.secret in (new.secret, *new.ended):
            # Its networks, permissions and times are made up, and later calls change them.
            allowed = set(pb.Verdict.values()) - {pb.VERDICT_MALFORMED, pb.VERDICT_UNKNOWN}
            if new.deleted:
                allowed = {pb.VERDICT_DELETED}
            elif not new.may_be_valid(request):
                allowed.remove(pb.VERDICT_VALID)
        if verdict not in allowed:
            raise Finding(f"the verdict is {pb.Verdict.Name(verdict)}")


def _judge(method: Method, parts: list[bytes], answer: Answer) -> None:
    """Check the guarantees for every answer. Raises Finding."""
    code = answer.code
    if code not in REFUSALS | PASSING | {grpc.StatusCode.OK} or (
        code is grpc.StatusCode.FAILED_PRECONDITION and TOO_MANY not in answer.message
    ):
        raise Finding(f"{method.path}: {code.name}: {answer.message}")
    said = answer.message.encode("utf-8", "surrogateescape") + b"".join(
        key.encode() + (value if isinstance(value, bytes) else value.encode())
        for key, value in answer.metadata
    )
    for secret in SECRETS.values():
        # A part of a secret is not a secret, and may be a name like any other; but a status must
        # not contain names. Reflection's answers repeat the question, as its protocol requires.
        answers = [] if method.path == REFLECTION else answer.responses
        if secret[5:48].encode() in said or any(secret.encode() in text for text in answers):
            raise Finding(f"{method.path}: the answer contains a canary")
    for digest in (LIVE.digest.value, DELETED.digest.value):
        for form in (digest, digest.hex().encode(), base64.b64encode(digest)[:42]):
            if form in said:
                raise Finding(f"{method.path}: the status contains a digest")
    if (trace := _TRACES.search(said)) and not any(trace[0] in part for part in parts):
        raise Finding(f"{method.path}: the status exposes internals: {said!r}")
    if code is grpc.StatusCode.OK:
        for response in answer.responses:
            method.response.FromString(response)
        return
    packed = [v for k, v in answer.metadata if k == "grpc-status-details-bin"]
    if len(packed) != 1 or not isinstance(packed[0], bytes):
        raise Finding(f"{method.path}: {code.name} without details: {answer.message}")
    status = status_pb2.Status.FromString(packed[0])
    if (status.code, status.message) != (code.value[0], answer.message):
        raise Finding(f"{method.path}: the details belong to another status")
    kinds = {detail.TypeName() for detail in status.details}
    wanted = {error_details_pb2.ErrorInfo, error_details_pb2.RequestInfo}
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        wanted.add(error_details_pb2.BadRequest)
    if code in PASSING:
        wanted.add(error_details_pb2.RetryInfo)
    if kinds != {kind.DESCRIPTOR.full_name for kind in wanted}:
        raise Finding(f"{method.path}: {code.name} with {sorted(kinds)}")


TARGET = Messages
