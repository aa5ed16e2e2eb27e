"""Answers that a client does not read, with the documented configuration of Envoy."""

import contextlib
from pathlib import Path

import psutil
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.helpers import raw_http2 as http2
from tests.helpers.calls import outcome
from tests.helpers.raw_http2 import connected
from tests.helpers.waiting import WAIT_SECONDS, eventually
from tests.integration.transport.test_envoy import (
    CONFIGURATION,
    OK,
    UNAVAILABLE,
    channel_to,
    envoy_before_latchkey,
    in_its_place,
    tls_of,
)

# Answers that the test lets Envoy request at once, and the calls that a caller makes.
SLOTS, STALLED_CONNECTIONS, STALLED_CALLS = 4, 3, 12
# Fits into the window of a stream before Envoy has opened it further.
QUESTIONS = 700
FRAME_BYTES = 16_384
MIB = 1024 * 1024
# Some times what the answers take, because the transport copies them. Without the limit on
# concurrent calls, they would take 100 MiB; and 600 MiB, if their size had no limit either.
GROWTH_BYTES_MAX = 60 * MIB


async def test_unread_answers_fill_no_memory(
    postgres_url: str, template_url: str, pepper_file: Path, scratch: Path, tmp_path: Path
) -> None:
    """A verifier that asks for large answers and opens no window for them occupies a bounded amount
    of memory. Others verify and manage meanwhile, and send batches once its calls have ended."""
    text = in_its_place(CONFIGURATION, "max_requests: 64", f"max_requests: {SLOTS}")
    text = in_its_place(text, "idle_timeout: 15s", "idle_timeout: 2s")
    path = "/latchkey.v1.TokenService/BatchVerify"
    async with contextlib.AsyncExitStack() as stack:
        target, _ = await stack.enter_async_context(
            envoy_before_latchkey(postgres_url, pepper_file, scratch, "unread", text)
        )
        manager = await stack.enter_async_context(channel_to(target, "manager"))
        labels = {f"{n:02}" + "𐍈" * 61: "𐍈" * 255 for n in range(16)}
        request = pb.CreateRequest(
            account_id="acme", name="large", scope=pb.SCOPE_READ, labels=labels
        )
        created = await pb_grpc.TokenServiceStub(manager).Create(request, timeout=WAIT_SECONDS)
        question = pb.VerifyRequest(secret=created.secret)
        batch = pb.BatchVerifyRequest(requests=[question] * QUESTIONS)
        context = tls_of("verifier", tmp_path)
        before = psutil.Process().memory_info().rss
        stalled = []
        for _ in range(STALLED_CONNECTIONS):
            raw = await stack.enter_async_context(connected(target, tls=context))
            await raw.open({http2.INITIAL_WINDOW_SIZE: 0})
            for _ in range(STALLED_CALLS):
                data = http2.message(batch.SerializeToString())
                stream = raw.begin(http2.headers(path))
                for at in range(0, len(data), FRAME_BYTES):
                    last = at + FRAME_BYTES >= len(data)
                    part = data[at : at + FRAME_BYTES]
                    raw.send(http2.DATA, http2.END_STREAM if last else 0, stream, part)
            await raw.drain()
            stalled.append(raw)
        # Calls beyond the limit have ended, so all of them have arrived.
        for raw in stalled[1:]:
            await raw.until(http2.HEADERS)
        verifier = await stack.enter_async_context(channel_to(target, "verifier"))
        stub = pb_grpc.TokenServiceStub(verifier)
        answer = await stub.Verify(question, timeout=WAIT_SECONDS)
        assert answer.verdict == pb.VERDICT_VALID
        listed = await pb_grpc.TokenServiceStub(manager).List(
            pb.ListRequest(account_id="acme"), timeout=WAIT_SECONDS
        )
        assert len(listed.tokens) == 1
        assert psutil.Process().memory_info().rss - before < GROWTH_BYTES_MAX

        async def answers() -> bool:
            found = await outcome(stub.BatchVerify(batch, timeout=WAIT_SECONDS))
            assert found.code in (OK, UNAVAILABLE)
            return found.code is OK

        await eventually(answers, "other callers' batches are answered")
