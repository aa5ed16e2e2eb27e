"""The command line tool as a process, against a running server."""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.helpers.tool import NOWHERE, Run
from tests.helpers.watch_client import watching

Create = Callable[..., Awaitable[pb.CreateResponse]]
GARBAGE = "lk" + "_" + "x" * 57


class Scripted(pb_grpc.TokenServiceServicer):
    """A Latchkey with answers that a healthy one rarely gives."""

    async def Create(self, request: pb.CreateRequest, context: Any) -> pb.CreateResponse:  # noqa: N802
        await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        raise AssertionError("abort raises")

    async def List(self, request: pb.ListRequest, context: Any) -> pb.ListResponse:  # noqa: N802
        page = int(request.page_token or "0")
        if request.account_id == "broken" and page == 1:
            await context.abort(grpc.StatusCode.INTERNAL, "the second page is lost")
        tokens = [
            pb.Token(
                id=f"tok_{page}_{number}",
                account_id=request.account_id,
                name=f"[red]\x1b[31m{page}-{number}",
                scope=pb.SCOPE_READ,
                create_time=Timestamp(seconds=1_700_000_000),
            )
            for number in range(2)
        ]
        return pb.ListResponse(tokens=tokens, next_page_token=str(page + 1) if page < 2 else "")

    async def Delete(self, request: pb.DeleteRequest, context: Any) -> pb.DeleteResponse:  # noqa: N802
        if request.id == "lost":
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "too late")
        if request.id == "never":
            await context.abort(grpc.StatusCode.NOT_FOUND, "never had it")
        receipt = pb.Receipt(
            commit_time=Timestamp(seconds=1_700_000_000),
            effective_time=Timestamp(seconds=1_700_000_000, nanos=250_000_000),
            revision=9,
            verifiers_acknowledged=2,
            verifiers_outwaited=1,
            mark=2**63,
            clients_acknowledged=3,
            clients_outwaited=2,
        )
        if request.no_wait:
            receipt.ClearField("effective_time")
        if request.id == "unconfirmed":
            info = error_details_pb2.ErrorInfo(reason="DELETION_NOT_CONFIRMED", domain="latchkey")
            packed = AnyMessage()
            packed.Pack(info)
            status = status_pb2.Status(code=grpc.StatusCode.UNAVAILABLE.value[0], details=[packed])
            trailing = (("grpc-status-details-bin", status.SerializeToString()),)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not in time", trailing)
        return pb.DeleteResponse(receipt=receipt)


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


async def test_token_life_cycle(run: Run, address: str) -> None:
    """JSON and exit codes suffice for a script to create, list, get, verify and delete a token."""
    created = await run(
        *("create", "ci", "--scope", "read", "--expires", "30d", "--json"),
        *("--label", "team=core", "--label", "formula=a=b"),
        target=address,
    )
    assert (created.code, created.err) == (0, "")
    token, secret = created.json["token"], created.json["secret"]
    assert token["scope"] == "SCOPE_READ"
    assert token["labels"] == {"team": "core", "formula": "a=b"}
    assert token["expire_time"] > token["create_time"]

    listed, got, valid, too_much, garbage = await asyncio.gather(
        run("list", "--json", target=address),
        run("get", token["id"], "--json", target=address),
        run("verify", "--json", target=address, stdin=secret + "\n"),
        run("verify", "--scope", "write", "--json", target=address, stdin=secret),
        run("verify", target=address, stdin=secret + "\n\n"),
    )
    assert listed.json == [token]
    assert got.json == token
    assert (valid.code, valid.json["verdict"]) == (0, "VERDICT_VALID")
    assert valid.json["token"] == token | {"secrets": []}
    assert (too_much.code, too_much.json["verdict"]) == (5, "VERDICT_INSUFFICIENT_SCOPE")
    # The tool drops one newline. A second one is part of the presented secret.
    assert garbage.code == 5
    assert "MALFORMED" in garbage.out

    deleted = await run("delete", token["id"], "--yes", "--json", target=address)
    assert deleted.code == 0
    assert deleted.json[0]["id"] == token["id"]
    assert deleted.json[0]["receipt"]["revision"] > 0
    after, gone, again, empty = await asyncio.gather(
        run("verify", "--json", target=address, stdin=secret),
        run("get", token["id"], "--json", target=address),
        run("delete", token["id"], "--yes", "--json", target=address),
        run("list", "--json", target=address),
    )
    assert (after.code, after.json["verdict"]) == (5, "VERDICT_DELETED")
    assert (gone.code, gone.out, gone.error["code"]) == (3, "", "NOT_FOUND")
    assert gone.error["request_id"]
    assert again.json == deleted.json
    assert empty.json == []


async def test_piped_create_writes_only_the_secret(run: Run, address: str) -> None:
    """`latchkey create … > file` writes only the secret to the file and prints it nowhere else."""
    created = await run("create", "ci", "--scope", "WRITE", target=address)
    assert created.code == 0
    secret = created.out.removesuffix("\n")
    assert secret.startswith("lk_")
    assert secret.isascii()
    assert len(secret) == 60
    assert secret not in created.err
    assert "shown only once" in created.err
    assert "ci" in created.err
    verified = await run("verify", "--scope", "write", target=address, stdin=created.out)
    assert verified.code == 0
    assert secret not in verified.out + verified.err


async def test_service_errors_have_their_exit_codes(run: Run, address: str, create: Create) -> None:
    """A taken name exits with 4, an unknown id with 3, and invalid arguments with 2."""
    await create(name="Taken")
    taken, wrong, unknown = await asyncio.gather(
        run("create", "taken", "--scope", "read", target=address),
        run("create", " ", "--scope", "read", "--label", "k=a\nb", target=address),
        run("get", "nope", target=address),
    )
    assert taken.code == 4
    assert "another name" in taken.err
    assert wrong.code == 2
    assert "name: " in wrong.err
    assert "labels[" in wrong.err
    assert unknown.code == 3
    for result in (taken, wrong, unknown):
        assert result.out == ""
        assert result.err.startswith("latchkey: ")
        assert "; " in result.err
        assert result.err.count("\n") == 1


async def test_no_answer_exits_6_promptly(run: Run, scripted: tuple[str, Scripted]) -> None:
    """Without a server, the tool says so within seconds and describes the possible effects: a call
    without a connection changed nothing, but one whose answer was lost may have."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    listed, refused, lost, deleted, verified = await asyncio.gather(
        run("list"),
        run("create", "x", "--scope", "read"),
        run("create", "x", "--scope", "read", target=scripted[0]),
        run("delete", "x", "--yes", "--json"),
        run("verify", stdin=GARBAGE),
    )
    assert loop.time() - start < 15
    assert {r.code for r in (listed, refused, lost, deleted, verified)} == {6}
    assert NOWHERE in listed.err
    assert "('latchkey serve'), then try again\n" in listed.err
    assert "('latchkey serve'), then try again: nothing was changed\n" in refused.err
    assert "('latchkey serve'); the token may exist: look for 'x' in" in lost.err
    assert "'latchkey list -a acme' and rotate it" in lost.err
    assert deleted.error["code"] == "UNAVAILABLE"
    assert "('latchkey serve'), then try again: nothing was changed" in deleted.error["to_do"]
    assert "('latchkey serve'); treat the secret as invalid" in verified.err
    assert GARBAGE not in verified.err


async def test_lists_are_complete_and_escaped(run: Run, scripted: tuple[str, Scripted]) -> None:
    """A list contains all pages, or up to the limit, and its names are escaped."""
    target, _ = scripted
    table, array, limited, broken = await asyncio.gather(
        run("list", target=target),
        run("list", "--json", target=target),
        run("list", "--json", "--limit", "3", target=target),
        run("list", "--json", "-a", "broken", target=target),
    )
    lines = table.out.splitlines()
    assert lines[0].split() == ["Name", "Scope", "Created", "Expires", "Hint", "Last", "used", "ID"]
    assert len(lines) == 7
    assert r"[red]\x1b[31m2-1" in lines[6]
    assert "2023-11-14 22:13 UTC" in lines[6]
    assert "\x1b" not in table.out + array.out
    ids = [f"tok_{page}_{number}" for page in range(3) for number in range(2)]
    assert [token["id"] for token in array.json] == ids
    assert [token["id"] for token in limited.json] == ids[:3]
    # An incomplete list must not look complete.
    assert broken.code == 1
    with pytest.raises(ValueError, match=r"Expecting"):
        json.loads(broken.out)


async def test_each_deletion_is_reported_and_the_worst_sets_the_exit_code(
    run: Run, scripted: tuple[str, Scripted]
) -> None:
    """Every token is processed, and an unconfirmed deletion decides the exit code."""
    target, _ = scripted
    people, script = await asyncio.gather(
        run("delete", "lost", "one", "never", "--yes", target=target),
        run("delete", "one", "never", "--yes", "--json", target=target),
    )
    assert people.code == 6
    assert "Deleted one" in people.out
    said = "250 ms: 2 servers and 3 clients confirmed, 3 outwaited (1 server and 2 clients)"
    assert said in " ".join(people.out.split())
    assert [line.split("'")[1] for line in people.err.splitlines()] == ["lost", "never"]
    assert script.code == 3
    receipt = script.json[0]["receipt"]
    assert (receipt["verifiers_outwaited"], receipt["clients_outwaited"]) == (1, 2)
    assert (receipt["clients_acknowledged"], receipt["mark"]) == (3, str(2**63))
    assert script.json[1]["error"]["exit_code"] == 3


async def test_unconfirmed_deletions_are_reported_as_such(
    run: Run, scripted: tuple[str, Scripted]
) -> None:
    """--no-wait says that confirmation is pending. A deletion that times out is still reported as
    committed."""
    target, _ = scripted
    people, script, unconfirmed = await asyncio.gather(
        run("delete", "one", "two", "--yes", "--no-wait", target=target),
        run("delete", "one", "--yes", "--no-wait", "--json", target=target),
        run("delete", "unconfirmed", "--yes", "--timeout", "1", target=target),
    )
    assert people.code == 0
    assert people.out.count("not yet confirmed everywhere: run this again") == 2
    assert "dead" not in people.out
    assert script.json[0]["receipt"]["effective_time"] is None
    assert unconfirmed.code == 6
    assert "the token is deleted, but" in unconfirmed.err
    assert "run this command again for the receipt" in unconfirmed.err


async def test_invalidate_all_reports_what_went_wrong(
    run: Run, address: str, scripted: tuple[str, Scripted]
) -> None:
    """The exit code names the cause: the service lacks the method, is down, or has a client that
    does not confirm in time."""
    async with watching(address) as client:
        await client.granted()
        # The command takes longer to start than one lease lasts, if the machine is busy.
        holding = asyncio.create_task(client.hold())
        unconfirmed = await run("invalidate-all", "--yes", "--timeout", "1", target=address)
        await holding
        await client.say(released=True)
    old, away = await asyncio.gather(
        run("invalidate-all", "--yes", target=scripted[0]),
        run("invalidate-all", "--yes", "--timeout", "1"),
    )
    assert (unconfirmed.code, unconfirmed.out) == (6, "")
    assert "not every verifier confirmed in time that its cache is empty" in unconfirmed.err
    assert "run this command again; --timeout allows more time" in unconfirmed.err
    assert "deleted" not in unconfirmed.err
    assert (old.code, old.out) == (1, "")
    assert "UNIMPLEMENTED" in old.err
    assert (away.code, away.out) == (6, "")
    assert "then try again: nothing was changed" in away.err


async def test_closed_pipe_is_quiet(run: Run, address: str, scripted: tuple[str, Scripted]) -> None:
    """A closed pipe stops `list` silently, but `create` reports a secret that nobody received."""
    ends = [os.pipe() for _ in range(2)]
    for reader, _ in ends:
        os.close(reader)
    listed, created = await asyncio.gather(
        run("list", target=scripted[0], stdout=ends[0][1]),
        run("create", "x", "--scope", "read", target=address, stdout=ends[1][1]),
    )
    for _, writer in ends:
        os.close(writer)
    assert (listed.code, listed.err) == (141, "")
    assert created.code == 1
    assert re.search(r"'latchkey rotate tok_[0-9a-z]{26} -a acme'", created.err)


async def test_completion_works(run: Run) -> None:
    """Every shell gets a completion script, and in bash it completes commands and scopes."""
    variable = "_LATCHKEY_COMPLETE"
    scripts = await asyncio.gather(
        *(run(**{variable: f"source_{shell}"}) for shell in ("bash", "zsh", "fish"))
    )
    for script in scripts:
        assert script.code == 0
        assert variable in script.out
    words = await run(**{variable: "complete_bash", "COMP_WORDS": "latchkey ", "COMP_CWORD": "1"})
    commands = (
        "create list get delete update disable enable rotate retire-secrets usage find revoke"
    )
    commands += " delete-all import verify status invalidate-all audit console receiver serve"
    commands += " policy dev-ca migrate doctor proto config"
    assert words.out.split() == commands.split()
    in_bash = """
        source /dev/stdin
        COMP_WORDS=(latchkey create x --scope w) COMP_CWORD=4
        _latchkey_completion latchkey
        echo "${COMPREPLY[@]}"
        latchkey --show-completion
        exit 0
    """
    path = f"{Path(sys.executable).parent}:{os.defpath}"
    result = await run(command=("bash", "-c", in_bash), stdin=scripts[0].out, PATH=path)
    completed, _, shown = result.out.partition("\n")
    assert completed == "write"
    assert shown.strip() == scripts[0].out.strip()


async def test_serve_and_config_become_the_service(run: Run) -> None:
    """The commands run the service with this environment."""
    config, serve, version = await asyncio.gather(
        run("config", "--json", LATCHKEY_LISTEN="127.0.0.1:7"),
        run("serve", LATCHKEY_LISTEN="nonsense"),
        run("--version"),
    )
    assert config.code == 0
    assert config.json["LATCHKEY_LISTEN"] == "127.0.0.1:7"
    assert serve.code == 2
    assert "LATCHKEY_LISTEN" in serve.err
    assert version.code == 0
    assert version.out.startswith("latchkey ")
    assert re.search(r"^service with schema \d{4}$", version.out, re.MULTILINE)
