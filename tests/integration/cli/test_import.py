"""`latchkey import`, as a process against a running server."""

import hashlib
import json
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.helpers.servers import make_settings, serving
from tests.helpers.tool import Run


@pytest.fixture
async def accepting(database_url: str, pepper_file: Path) -> AsyncIterator[str]:
    """Address of a server that accepts imported secrets."""
    settings = make_settings(database_url, pepper_file, "native")
    async with serving(settings.model_copy(update={"imported_prefixes": "sk_live_"})) as address:
        yield address


def key() -> str:
    return "sk_live_" + secrets.token_urlsafe(24)


def hex_of(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


async def verdicts(address: str, *presented: str) -> list[str]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = pb_grpc.TokenServiceStub(channel)
        found = [await stub.Verify(pb.VerifyRequest(secret=s), timeout=9) for s in presented]
    return [pb.Verdict.Name(answer.verdict).removeprefix("VERDICT_") for answer in found]


async def test_import_dry_run_and_repetition(run: Run, accepting: str, tmp_path: Path) -> None:
    """A dry run imports nothing. An import accepts the keys; a repeated one skips what is there. A
    refused row is named with its line and column, and does not stop the others."""
    good, twin, disabled = key(), key(), key()
    (tmp_path / "keys.csv").write_text(
        "hash,name,scope,expires,enabled,label.plan,rate\n"
        f"{hex_of(good)},deploy,write,,true,pro,100/minute\n"
        "nonsense,broken,read,,,,\n"
        f"{hex_of(twin)},Deploy,read,,,,\n"
        f"{hex_of(disabled)},paused,read,2100-01-01T00:00:00Z,false,,\n"
        f"{hex_of(key())},old,read,2020-01-01T00:00:00Z,,,\n"
    )
    dry = await run("import", "keys.csv", "--dry-run", target=accepting)
    assert dry.code == 2
    assert dry.out == (
        "would be imported: 2\nalready imported, skipped: 0\nexpired, skipped: 1\nrefused: 2\n"
    )
    assert dry.err.splitlines()[0].startswith("keys.csv:3: hash: is not a SHA-256 hash")
    assert dry.err.splitlines()[1].startswith("keys.csv:4: name: a live token of the account has")
    assert await verdicts(accepting, good) == ["UNKNOWN"]

    done = await run("import", "keys.csv", "--number-names", "--json", target=accepting)
    assert done.code == 2
    counts = {name: done.json[name] for name in ("imported", "exists", "expired", "refused")}
    assert counts == {"imported": 3, "exists": 0, "expired": 1, "refused": 1}
    assert done.json["refused_rows"][0]["line"] == 3
    assert done.err == ""
    listed = await run("list", "--json", target=accepting)
    tokens = {token["name"]: token for token in listed.json}
    assert tokens.keys() == {"deploy", "Deploy 2", "paused"}
    assert tokens["deploy"]["rate_limit"]["count"] == 100
    assert tokens["paused"]["rate_limit"] is None
    assert await verdicts(accepting, good, twin, disabled) == ["VALID", "VALID", "DISABLED"]

    again = await run("import", "keys.csv", target=accepting)
    assert again.out == (
        "imported: 0\nalready imported, skipped: 3\nexpired, skipped: 1\nrefused: 1\n"
    )


async def test_json_lines_defaults_and_standard_input(
    run: Run, accepting: str, tmp_path: Path
) -> None:
    """Options fill in what rows lack. Standard input is read too."""
    first, second, third = key(), key(), key()
    (tmp_path / "keys.jsonl").write_text(
        json.dumps({"hash": hex_of(first), "account": "globex", "networks": ["192.0.2.0/24"]})
        + "\n"
        + json.dumps({"hash": hex_of(second), "scope": "write", "labels": {"a": "b"}})
        + "\n"
    )
    options = ("--scope", "read", "--expires", "30d", "--label", "from=unkey", "--label", "a=c")
    done = await run("import", "keys.jsonl", *options, target=accepting)
    assert (done.code, done.out.splitlines()[0]) == (0, "imported: 2"), done.err
    assert await verdicts(accepting, first, second) == ["ADDRESS_NOT_ALLOWED", "VALID"]
    (token,) = (await run("list", "--json", target=accepting)).json
    assert token["scope"] == "SCOPE_WRITE"
    assert token["labels"] == {"from": "unkey", "a": "b"}
    assert token["expire_time"] is not None
    row = f"hash,name,scope\n{hex_of(third)},x,read\n"
    piped = await run("import", "-", target=accepting, stdin=row)
    assert piped.code == 0, piped.err
    assert await verdicts(accepting, third) == ["VALID"]


async def test_files_that_are_refused(run: Run, accepting: str, tmp_path: Path) -> None:
    """Secrets in plain text, unknown columns and missing files are refused with exit code 2, and no
    output contains a secret. --stop-on-error keeps later rows out."""
    secret = key()
    (tmp_path / "plain.csv").write_text(f"key,name\n{secret},x\n")
    plain = await run("import", "plain.csv", target=accepting)
    assert plain.code == 2
    assert "imports only hashes" in plain.err
    assert secret not in plain.out + plain.err
    missing = await run("import", "nothing.csv", target=accepting)
    assert missing.code == 2
    assert "cannot read nothing.csv" in missing.err
    (tmp_path / "stop.csv").write_text(
        f"hash,name,scope\n{hex_of(secret)},a,read\nx,b,read\n{hex_of(key())},c,read\n"
    )
    stopped = await run("import", "stop.csv", "--stop-on-error", target=accepting)
    assert stopped.code == 2
    assert stopped.out.startswith("imported: 1\n")
