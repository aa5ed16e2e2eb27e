"""The commands `revoke`, `delete-all` and `list`: against a running server, and a scripted one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.helpers.tool import Run

if TYPE_CHECKING:
    from latchkey_proto.v1.token_service_pb2_grpc import TokenServiceAsyncStub

Create = Callable[..., Awaitable[pb.CreateResponse]]
# With a valid checksum.
UNKNOWN = "lk" + "_0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abcdefghijklmno" + "0jDM4R"
TIME = Timestamp(seconds=1_700_000_000)


class Scripted(pb_grpc.TokenServiceServicer):
    """A Latchkey that has many tokens, and that fails on demand."""

    def __init__(self) -> None:
        self.left = 0
        self.batches: list[list[str]] = []
        self.fails_from = 99

    async def RevokeSecret(  # noqa: N802
        self, request: pb.RevokeSecretRequest, context: Any
    ) -> pb.RevokeSecretResponse:
        if len(self.batches) >= self.fails_from:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "too late")
        self.batches.append(list(request.secrets))
        outcome = pb.SECRET_OUTCOME_ENDED
        results = [pb.RevokeSecretResult(outcome=outcome) for _ in request.secrets]
        receipt = pb.Receipt(commit_time=TIME, effective_time=TIME, revision=len(self.batches))
        return pb.RevokeSecretResponse(results=results, receipt=receipt)

    async def DeleteAll(  # noqa: N802
        self, request: pb.DeleteAllRequest, context: Any
    ) -> pb.DeleteAllResponse:
        if request.dry_run:
            return pb.DeleteAllResponse(count=self.left)
        if request.account_id == "broken" and self.left < 2_000:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "too late")
        count = min(self.left, 1_000)
        self.left -= count
        receipt = pb.Receipt(commit_time=TIME, effective_time=TIME, revision=7)
        more = self.left > 0 or request.account_id == "lying"
        return pb.DeleteAllResponse(count=count, receipt=receipt, more=more)


@pytest.fixture
async def scripted() -> AsyncIterator[tuple[str, Scripted]]:
    """A scripted service and its address."""
    service = Scripted()  # type: ignore[abstract]  # other methods are never called
    server = grpc.aio.server()
    pb_grpc.add_TokenServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}", service
    await server.stop(0)


async def test_revoke_reports_each_line_without_a_secret(
    run: Run, address: str, create: Create, stub: TokenServiceAsyncStub
) -> None:
    """Each line has its outcome, empty lines are skipped, and white space does not matter. The
    secrets are dead afterwards, the token is not, and a second run says so."""
    created = await create(name="leaky")
    text = f"\n  {created.secret}\r\n{UNKNOWN}\nno secret\n{created.secret[:-1]}\n{'x' * 5000}\n"
    first = await run("revoke", target=address, stdin=text)
    assert first.out.splitlines() == [
        "line 2: ended",
        "line 3: no token has this secret",
        "line 4: not a secret of Latchkey",
        "line 5: not a secret of Latchkey",
        "line 6: not a secret of Latchkey",
    ]
    assert first.code == 3
    assert "5 secrets: 1 ended, 1 unknown, 3 malformed." in first.err
    assert "in effect everywhere" in first.err
    for piece in (created.secret[3:30], UNKNOWN[3:30]):
        assert piece not in first.out + first.err
    answer = await stub.Verify(pb.VerifyRequest(secret=created.secret))
    assert answer.verdict == pb.VERDICT_EXPIRED
    again = await run("revoke", "--json", target=address, stdin=created.secret)
    assert again.code == 0
    assert again.json[0]["results"] == [{"line": 1, "outcome": "SECRET_OUTCOME_ENDED_BEFORE"}]
    assert again.json[0]["receipt"]["effective_time"] is not None
    got = await run("get", created.token.id, target=address)
    assert got.code == 0


async def test_revoke_sends_batches(run: Run, scripted: tuple[str, Scripted]) -> None:
    """Any number of lines is sent in batches of 1,000, with progress, and one result a line."""
    target, service = scripted
    text = "\n".join(f"secret {number}" for number in range(2_500))
    result = await run("revoke", target=target, stdin=text)
    assert [len(batch) for batch in service.batches] == [1_000, 1_000, 500]
    assert (result.code, result.out.count(": ended\n")) == (0, 2_500)
    assert result.out.endswith("line 2500: ended\n")
    assert "1000 lines done.\n2000 lines done.\n" in result.err
    assert "2500 secrets: 2500 ended." in result.err
    as_json = await run("revoke", "--json", "--no-wait", target=target, stdin=text)
    assert [len(batch["results"]) for batch in as_json.json] == [1_000, 1_000, 500]


async def test_a_failed_batch_says_where_to_continue(
    run: Run, scripted: tuple[str, Scripted]
) -> None:
    """Lines before the failure are done and reported. The error names the first one that is not."""
    target, service = scripted
    service.fails_from = 1
    text = "".join(f"secret {number}\n" for number in range(1_500))
    result = await run("revoke", "--json", target=target, stdin=text)
    assert result.code == 6
    with pytest.raises(ValueError, match="Expecting"):
        json.loads(result.out)
    (error,) = [json.loads(line) for line in result.err.splitlines() if line.startswith("{")]
    assert "from line 1001 on" in error["error"]["message"]
    assert "the lines from 1001 on, which is safe" in error["error"]["to_do"]


@pytest.mark.parametrize("stdin", ["", "\n \n"])
async def test_revoke_of_nothing_is_an_error(
    run: Run, scripted: tuple[str, Scripted], stdin: str
) -> None:
    """An empty file is a mistake: a script must not report that it revoked something."""
    result = await run("revoke", target=scripted[0], stdin=stdin)
    assert result.code == 2
    assert "no secret on standard input" in result.err
    assert scripted[1].batches == []


async def test_list_by_filter(run: Run, address: str, create: Create) -> None:
    """The command lists and counts the tokens that match every filter, in each order."""
    soon, later = (Duration(seconds=days * 86_400) for days in (5, 20))
    await create(name="deploy", labels={"team": "data"}, ttl=later)
    await create(name="export", labels={"team": "data"}, ttl=soon)
    await create(name="forever", scope=pb.SCOPE_WRITE)

    async def names(*options: str) -> list[str]:
        listed = await run("list", "--json", *options, target=address)
        assert listed.code == 0, listed.err
        return [token["name"] for token in listed.json]

    assert await names("--order", "expiry") == ["export", "deploy", "forever"]
    assert await names("--order", "expiry", "--reverse", "--limit", "2") == ["forever", "deploy"]
    assert await names("--reverse", "--label", "team=data") == ["deploy", "export"]
    assert await names("--expires-before", "10d", "--never-used", "yes") == ["export"]
    assert await names("--never-expires", "yes", "--can-write", "yes") == ["forever"]
    assert await names("--search", "PORT", "--state", "active", "--scope", "read") == ["export"]
    assert await names("--secret-before", "1d") == []
    nothing, counted, as_json, wrong = await asyncio.gather(
        run("list", "--name-contains", "nobody", target=address),
        run("list", "--label", "team=data", "--count", target=address),
        run("list", "--count", "--json", target=address),
        run("list", "--search", " ", target=address),
    )
    assert (nothing.code, nothing.out) == (0, "")
    assert "has no such tokens" in nothing.err
    assert (counted.code, counted.out, counted.err) == (0, "2\n", "")
    assert as_json.json == {"count": 3, "capped": False}
    assert wrong.code == 2
    assert "give a text" in wrong.err


async def test_delete_all_by_filter(run: Run, address: str, create: Create) -> None:
    """A dry run lists what would go and deletes nothing. Only matching tokens are deleted."""
    kept = (await create(name="kept")).token
    for number in range(3):
        await create(name=f"job {number}", labels={"team": "data"})
    filters = ("--label", "team=data", "--state", "active", "--can-write", "no")
    looked, as_json, none = await asyncio.gather(
        run("delete-all", *filters, "--dry-run", target=address),
        run("delete-all", *filters, "--dry-run", "--json", target=address),
        run("delete-all", *filters, "--unused-since", "1d", "--dry-run", target=address),
    )
    assert (looked.code, as_json.code, none.code) == (0, 0, 0)
    assert [f"job {number}" in looked.out for number in range(3)] == [True] * 3
    assert "kept" not in looked.out
    assert "this deletes 3 tokens." in looked.err
    assert as_json.json["count"] == 3
    assert [token["name"] for token in as_json.json["tokens"]] == ["job 0", "job 1", "job 2"]
    assert "has no such tokens" in none.err

    deleted = await run("delete-all", *filters, "--yes", "--json", target=address)
    assert deleted.code == 0, deleted.err
    assert deleted.json["count"] == 3
    assert deleted.json["receipt"]["effective_time"] is not None
    listed = await run("list", "--json", target=address)
    assert [token["id"] for token in listed.json] == [kept.id]
    again = await run("delete-all", *filters, "--yes", target=address)
    assert (again.code, again.out) == (0, "")
    assert "has no such tokens" in again.err
    rest = await run("delete-all", "--yes", target=address)
    assert "Deleted 1 token\n" in rest.out
    assert "dead everywhere" in rest.out


async def test_delete_all_continues_until_none_is_left(
    run: Run, scripted: tuple[str, Scripted]
) -> None:
    """Thousands of tokens take several calls, with progress. A service that always says that there
    is more does not keep the command for ever."""
    target, service = scripted
    service.left = 2_300
    result = await run("delete-all", "--yes", target=target)
    assert result.code == 0
    assert "Deleted 1000 tokens, going on.\nDeleted 2000 tokens, going on.\n" in result.err
    assert "Deleted 2300 tokens\n" in result.out
    service.left = 10
    lying = await run("delete-all", "--yes", "-a", "lying", "--json", target=target)
    assert lying.json["count"] == 10


async def test_delete_all_that_fails_says_what_was_done(
    run: Run, scripted: tuple[str, Scripted]
) -> None:
    """If a later call fails, the error says how many tokens are deleted, and to run it again."""
    target, service = scripted
    service.left = 2_500
    result = await run("delete-all", "--yes", "-a", "broken", target=target)
    assert (result.code, result.out) == (6, "")
    assert "1000 tokens deleted before; more may be deleted" in result.err
    assert "run this again, which is safe" in result.err
