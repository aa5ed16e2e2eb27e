"""The commands and statements of docs/import.md, run exactly as printed."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import secrets
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from latchkey_cli.import_file import COLUMNS

from tests.helpers.documented import marked, paste
from tests.helpers.fork_server import Forked
from tests.helpers.repository import ROOT
from tests.helpers.servers import make_settings, serving
from tests.helpers.tool import make_run

PAGE = (ROOT / "docs/import.md").read_text("utf-8")
COMMANDS = marked("docs/import.md", "import")
BETTER_AUTH = """
CREATE TABLE apikey (
    id text PRIMARY KEY, "configId" text, name text, start text, "referenceId" text NOT NULL,
    prefix text, key text NOT NULL, enabled boolean, "expiresAt" timestamp,
    "createdAt" timestamp NOT NULL)
"""
OWN = """
CREATE TABLE api_keys (
    key_hash text, customer_id text, label text, can_write boolean, expires_at timestamptz,
    created_at timestamptz, last_four text, revoked_at timestamptz)
"""
# The columns of Unkey's tables `keys` (k) and `identities` (i) in 2026.
UNKEY = {
    "k": {"id", "key_auth_id", "hash", "start", "workspace_id", "for_workspace_id", "name"}
    | {"identity_id", "meta", "expires", "created_at_m", "updated_at_m", "deleted_at_m", "enabled"}
    | {"environment", "last_used_at", "pending_migration_id"},
    "i": {"id", "external_id", "workspace_id", "environment", "meta", "deleted", "created_at"},
}
# What the statement for Unkey has written, on MariaDB 10.11: for a key with an identity, for one
# without a name that expires, and for one that is disabled.
UNKEY_KEYS = {
    "acme_live_3ZaAAAAbbbbCCCCddddEEEE": "VALID",
    "acme_live_4ZaAAAAbbbbCCCCddddFFFF": "VALID",
    "acme_live_5ZaAAAAbbbbCCCCddddGGGG": "DISABLED",
}
UNKEY_LINES = """\
{"hash": "mcbbvvqK+WZnaZorGTEPAdTIDhitOQZU4ibydWmycd8=", "account": "customer-42", \
"name": "nightly export", "scope": "write", "expires": null, "created": "2026-01-01T00:00:00Z", \
"hint": "acme_live_3Za…", "enabled": "true", "labels": {"unkey_id": "key_1"}}
{"hash": "9tlC6fh3AvWIxkzugINSHnVSUEPRuMNlRxlpBIPajeU=", "account": "ws_1", \
"name": "key_2", "scope": "write", "expires": "2031-01-02T03:04:05.678000Z", \
"created": "2026-01-01T00:00:00Z", \
"hint": "acme_live_4Za…", "enabled": "true", "labels": {"unkey_id": "key_2"}}
{"hash": "ssPM47bUmqreh4qSMwNSgZ+TIToCwy2j2AF2WLikEwU=", "account": "ws_1", \
"name": "off é日", "scope": "write", "expires": null, "created": "2026-01-01T00:00:00Z", \
"hint": "acme_live_5Za…", "enabled": "false", "labels": {"unkey_id": "key_3"}}
"""


def block(name: str) -> str:
    (found,) = re.findall(
        rf"^<!-- test: {name} -->\n```sql\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL
    )
    return str(found)


@pytest.fixture
async def accepting(database_url: str, pepper_file: Path) -> AsyncIterator[str]:
    """Address of a server that is set up as the page says."""
    (prefixes,) = re.findall(r"^LATCHKEY_IMPORTED_PREFIXES=(.+)$", PAGE, re.MULTILINE)
    settings = make_settings(database_url, pepper_file, "native")
    settings = settings.model_copy(update={"imported_prefixes": f"{prefixes},*"})
    async with serving(settings) as address:
        yield address


async def exported(database_url: str, table: str, rows: list[tuple[Any, ...]], query: str) -> str:
    """Return the CSV that a statement of the page writes, from a table with these rows."""
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute(table)
        name = table.split()[2]
        values = ", ".join(f"${number + 1}" for number in range(len(rows[0])))
        await connection.executemany(f"INSERT INTO {name} VALUES ({values})", rows)  # noqa: S608 - ours
        found = re.fullmatch(r"COPY \((.*)\) TO STDOUT.*", query.strip(), re.DOTALL)
        assert found is not None
        file = io.BytesIO()
        await connection.copy_from_query(found[1], output=file, format="csv", header=True)
        return file.getvalue().decode()
    finally:
        await connection.close()


async def test_the_commands_work_as_printed(accepting: str, tmp_path: Path, latchkey: Path) -> None:
    """A reader who pastes the commands imports a key, which is then valid."""
    script = "\n".join(COMMANDS).replace(".venv/bin/latchkey", str(latchkey))
    assert ".venv" not in script
    output = await paste(script, tmp_path, LATCHKEY_TARGET=accepting)
    assert "would be imported: 1\n" in output
    assert "\nimported: 1\n" in output
    assert "\nVALID:" in output


async def test_export_from_better_auth(
    accepting: str, database_url: str, tmp_path: Path, forked: Forked
) -> None:
    """The statement writes a file that is imported without a refused row, and the keys work."""
    live, paused = (secrets.token_urlsafe(48) for _ in range(2))

    def stored(key: str) -> str:
        digest = hashlib.sha256(key.encode()).digest()
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")

    created, ends = datetime(2026, 1, 31, 18), datetime(2100, 1, 1)
    rows: list[tuple[Any, ...]] = [
        ("k1", "default", "ci", live[:6], "user|1", None, stored(live), True, None, created),
        ("k2", "default", None, None, "user|1", None, stored(paused), False, ends, created),
    ]
    text = await exported(database_url, BETTER_AUTH, rows, block("better-auth"))
    run = make_run(tmp_path, forked)
    done = await run("import", "-", target=accepting, stdin=text)
    assert (done.code, done.out.splitlines()[0]) == (0, "imported: 2"), done.err
    shown = (await run("list", "--json", target=accepting, LATCHKEY_ACCOUNT="user|1")).json
    assert {token["name"] for token in shown} == {"ci", "k2"}
    assert {token["create_time"][:10] for token in shown} == {"2026-01-31"}
    for key, verdict in ((live, "VALID"), (paused, "DISABLED")):
        found = await run("verify", "--json", target=accepting, stdin=key)
        assert found.json["verdict"] == f"VERDICT_{verdict}"


async def test_export_from_a_table_of_ones_own(
    accepting: str, database_url: str, tmp_path: Path, forked: Forked
) -> None:
    """The same for the last statement of the page. A revoked key stays out."""
    key = "acme_live_" + secrets.token_urlsafe(24)
    created = datetime(2026, 1, 31, 18, tzinfo=UTC)
    hashed = hashlib.sha256(key.encode()).hexdigest()
    rows: list[tuple[Any, ...]] = [
        (hashed, "acme", "deploy", True, None, created, key[-4:], None),
        (hashlib.sha256(b"x").hexdigest(), "acme", "old", True, None, created, "xxxx", created),
    ]
    text = await exported(database_url, OWN, rows, block("own table"))
    run = make_run(tmp_path, forked)
    done = await run("import", "-", target=accepting, stdin=text)
    assert (done.code, done.out.splitlines()[0]) == (0, "imported: 1"), done.err
    found = await run("verify", "--scope", "write", "--json", target=accepting, stdin=key)
    assert found.json["verdict"] == "VERDICT_VALID"
    (token,) = (await run("list", "--json", target=accepting)).json
    assert token["hint"] == f"acme_…{key[-4:]}"


async def test_export_from_unkey(accepting: str, tmp_path: Path, forked: Forked) -> None:
    """The file that the statement for Unkey writes is imported without a refused row, and the keys
    work."""
    path = tmp_path / "keys.jsonl"
    path.write_text(UNKEY_LINES, "utf-8")
    run = make_run(tmp_path, forked)
    done = await run("import", str(path), target=accepting)
    assert (done.code, done.out.splitlines()[0]) == (0, "imported: 3"), done.err
    for key, verdict in UNKEY_KEYS.items():
        found = await run("verify", "--scope", "write", "--json", target=accepting, stdin=key)
        assert found.json["verdict"] == f"VERDICT_{verdict}"
    shown = (await run("list", "--json", target=accepting, LATCHKEY_ACCOUNT="ws_1")).json
    assert {token["name"]: token.get("expire_time") for token in shown} == {
        "key_2": "2031-01-02T03:04:05.678000Z",
        "off é日": None,
    }


def test_statement_for_unkey_fits_its_tables() -> None:
    """The statement names only columns that Unkey has."""
    statement = block("unkey")
    for table, column in re.findall(r"\b([ki])\.(\w+)", statement):
        assert column in UNKEY[table], column
    assert len(re.findall(r"\bk\.", statement)) > 5


def test_columns_of_the_page() -> None:
    """The table lists each column once, and the statement for Unkey writes no other."""
    listed = re.findall(r"^\| `([a-z]+)` \|", PAGE, re.MULTILINE)
    assert listed == list(COLUMNS)
    written = set(re.findall(r"^ +'(\w+)',", block("unkey"), re.MULTILINE))
    assert written - {"labels"} <= set(COLUMNS)
