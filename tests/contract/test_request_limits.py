"""Size limits of requests, checked after the caller is authorized and before parsing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import grpc
import pytest
from google.protobuf import duration_pb2
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_service.access.methods import METHODS, VERIFY
from latchkey_service.coherence.use_reports import USES_IN_REPORT_MAX

from tests.helpers.callers import credential, policy_text
from tests.helpers.labels import create_with_labels
from tests.helpers.rich_status import refusal
from tests.helpers.servers import serving
from tests.helpers.watch_client import watching

if TYPE_CHECKING:
    from latchkey_service.settings.settings import Settings

TOKENS = "/latchkey.v1.TokenService/"
WATCHES = (TOKENS + "Watch", "/grpc.health.v1.Health/Watch")
REFLECTIONS = tuple(
    f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
    for version in ("v1", "v1alpha")
)
UNARY = sorted(set(METHODS) - {*WATCHES, *REFLECTIONS})
# What any protobuf parser rejects.
GARBAGE = b"\xff"


async def refused(channel: grpc.aio.Channel, path: str, data: bytes) -> str:
    """Send bytes to any method and return the reason of its refusal."""
    if path in UNARY:
        method: Any = channel.unary_unary(path)
        call = method(data, timeout=10)
    elif path == WATCHES[1]:
        method = channel.unary_stream(path)
        call = method(data, timeout=10).read()
    else:
        method = channel.stream_stream(path)
        call = method(iter([data]), timeout=10).read()
    error = await refusal(call)
    assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [""]), path
    # The whole request is at fault, so the text names no field.
    assert error.message.startswith("the request "), path
    return error.reason


async def test_each_method_has_a_limit(channel: grpc.aio.Channel) -> None:
    """A request of one byte more than the limit is refused with the limit, and one
    within the limit is parsed. Every method and every message of a stream has such a limit."""
    for path, rule in METHODS.items():
        assert await refused(channel, path, GARBAGE * rule.bytes_max) == "REQUEST_NOT_PARSED"
        data = GARBAGE * (rule.bytes_max + 1)
        if path == VERIFY:
            call: Any = channel.unary_unary(path)
            assert (
                pb.VerifyResponse.FromString(await call(data, timeout=10)).verdict
                == pb.VERDICT_MALFORMED
            )
        else:
            assert await refused(channel, path, data) == "REQUEST_TOO_LARGE", path


async def test_largest_legal_requests_fit(create: Any, stub: Any) -> None:
    """A Create with the longest name and labels in any script succeeds, and so does a BatchVerify
    of 1,000 secrets."""
    labels = {f"{n:02}" + "𐍈" * 61: "𐍈" * 255 for n in range(16)}
    created = await create(name="𐍈" * 64, account_id="a" * 64, labels=labels)
    question = pb.VerifyRequest(secret=created.secret, required_scope=pb.SCOPE_READ)
    assert (await stub.Verify(question)).verdict == pb.VERDICT_VALID
    batch = pb.BatchVerifyRequest(requests=[question] * 1_000)
    # The stub has gRPC's default limit for the size of answers.
    answers = (await stub.BatchVerify(batch, timeout=10)).responses
    assert [answer.verdict for answer in answers] == [pb.VERDICT_VALID] * 1_000
    assert answers[0].token.labels == labels
    assert answers[-1].details_omitted
    assert not answers[-1].token.labels


async def test_pages_of_large_tokens_fit(create: Any, stub: Any) -> None:
    """Pages of the largest tokens are shorter, so that each fits into gRPC's default limit. All
    tokens are listed once, and a dry run of DeleteAll shows as many as fit."""
    labels = {f"{n:02}" + "𐍈" * 61: "𐍈" * 255 for n in range(16)}
    account = f"large-{uuid4()}"
    count = 184
    for first in range(0, count, 4):
        await asyncio.gather(
            *(
                create(name=f"{number}", account_id=account, labels=labels)
                for number in range(first, first + 4)
            )
        )
    found, page_token, pages = [], "", 0
    while page_token or not pages:
        request = pb.ListRequest(account_id=account, page_size=500, page_token=page_token)
        page = await stub.List(request, timeout=10)
        found += [int(token.name) for token in page.tokens]
        page_token = page.next_page_token
        pages += 1
    assert sorted(found) == list(range(count))
    assert pages == 2
    shown = await stub.DeleteAll(pb.DeleteAllRequest(account_id=account, dry_run=True), timeout=10)
    assert shown.count == count
    assert 100 < len(shown.tokens) < count


async def test_largest_report_of_uses_fits(address: str) -> None:
    """A Watch accepts a report with as many uses as a client may send at once, each of the largest
    size."""
    age = duration_pb2.Duration(seconds=90 * 86_400, nanos=999_999_999)
    use = pb.TokenUse(
        token_id="tok_" + "z" * 26,
        hint="p" * 10 + "_…abcd",
        count=2**62,
        first_use_age=age,
        last_use_age=age,
    )
    report = pb.UseReport(number=2**62, uses=[use] * USES_IN_REPORT_MAX)
    async with watching(address) as client:
        await client.granted()
        await client.say(number=2**62, use_report=report)
        while not isinstance(event := await client.hear(), pb.UseReportReceived):
            await client.say()
        assert event.number == report.number


async def test_many_labels_are_refused_unread(channel: grpc.aio.Channel) -> None:
    """A Create with 590,000 labels is refused for its size."""
    data = create_with_labels(590_000)
    assert await refused(channel, TOKENS + "Create", data) == "REQUEST_TOO_LARGE"


@pytest.mark.parametrize(
    ("method", "data"),
    [
        pytest.param("Import", b"\x0a\x00" * 250_000, id="rows"),
        pytest.param("Watch", b"\x2a\xe0\xc8\x07" + b"\x12\x00" * 62_000, id="uses"),
        pytest.param("Watch", b"\x32\xe0\xc8\x07" + b"\x12\x00" * 62_000, id="rate limits"),
        # The parser merges the parts.
        pytest.param("Watch", (b"\x2a\xa0\x1f" + b"\x12\x00" * 2_000) * 30, id="parts"),
    ],
)
async def test_many_entries_are_refused_unread(
    channel: grpc.aio.Channel, method: str, data: bytes
) -> None:
    """Entries of two bytes each are refused for their number, although their size is allowed: to
    parse them would keep the event loop from other calls."""
    assert await refused(channel, TOKENS + method, data) == "REQUEST_TOO_LARGE"


async def test_callers_are_authorized_before_anything_is_parsed(
    settings: Settings, tmp_path: Path
) -> None:
    """An anonymous caller, and one without the role, learn nothing about their request: neither its
    size nor whether it parses. Health checks and reflection are open to everyone."""
    policy = tmp_path / "policy.toml"
    policy.write_text(policy_text())
    settings = settings.model_copy(update={"policy": policy})
    async with serving(settings) as address, grpc.aio.insecure_channel(address) as channel:
        for path, rule in METHODS.items():
            if rule.role is None or path == WATCHES[0]:
                continue
            for data in (GARBAGE, GARBAGE * (rule.bytes_max + 1)):
                call: Any = channel.unary_unary(path)
                assert (await refusal(call(data, timeout=10))).reason == "CALLER_ANONYMOUS", path
                other = "verifier" if rule.role != "verifier" else "operator"
                metadata = (("authorization", f"Bearer {credential(other)}"),)
                refused_call = call(data, metadata=metadata, timeout=10)
                assert (await refusal(refused_call)).reason == "METHOD_DENIED", path
        # Nothing is written: a refusal may overtake what the client writes.
        stream: Any = channel.stream_stream(WATCHES[0])
        assert (await refusal(stream(timeout=10).read())).reason == "CALLER_ANONYMOUS"


@pytest.mark.parametrize("path", [*WATCHES, *REFLECTIONS])
async def test_streams_refuse_large_messages(channel: grpc.aio.Channel, path: str) -> None:
    """A 4 MiB message of a stream, such as a health check of a service with a long name, is refused
    before it is parsed."""
    assert await refused(channel, path, b"\x0a\x80\x80\x80\x02" + bytes(4 << 20)) == (
        "REQUEST_TOO_LARGE"
    )
