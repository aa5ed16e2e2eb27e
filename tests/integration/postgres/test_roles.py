"""A service whose database role does not own the tables."""

import asyncio
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest
from latchkey_proto.v1 import audit_service_pb2 as audit_pb
from latchkey_proto.v1 import audit_service_pb2_grpc as audit_pb_grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.audit.audit_chain import ChainKeys
from latchkey_service.audit.audit_sealer import AuditSealer
from latchkey_service.audit.audit_table import AuditTable, NewEntry
from latchkey_service.audit.chain_table import ChainTable
from latchkey_service.postgres.connections import Connector, Pool
from latchkey_service.postgres.migrate import Migration, MigrationError, bundled, migrate
from latchkey_service.settings.settings import Settings
from latchkey_service.tokens import pepper_file as pepper_files

from tests.helpers.calls import is_serving
from tests.helpers.databases import session
from tests.helpers.fork_server import Forked
from tests.helpers.postgres_node import Node, Template
from tests.helpers.servers import serving
from tests.helpers.waiting import eventually

COMMAND_SECONDS_MAX = 30.0


@pytest.fixture
async def service_url(node: Node, node_template: Template) -> str:
    """The URL of the service's role, after the owner has migrated the database."""
    await node.execute(f"CREATE ROLE service LOGIN PASSWORD '{node_template.password}'")
    await migrate(node.url, bundled(), service_role="service")
    return node.url_at(node.address, role="service")


async def test_the_service_needs_no_other_rights(
    service_url: str, pepper_file: Path, tmp_path: Path
) -> None:
    """With the rights that `migrate --grant` gives, a service starts, manages and verifies tokens,
    reads and seals the audit log, and removes old entries."""
    assert await migrate(service_url, bundled()) == []
    pool = await Pool.open(Connector(service_url))
    keys = ChainKeys(pepper_files.load(pepper_file))
    sealer = AuditSealer(ChainTable(pool), keys, lambda: 0.0, lambda: 0.0)
    long_ago = datetime.now(UTC) - timedelta(days=9)
    await AuditTable(pool).insert([NewEntry(long_ago, "a", "m", "", "", "", "", 0, "", 1)])
    await sealer.seal()
    settings = Settings(
        database_url=service_url,
        pepper_file=pepper_file,
        data_dir=tmp_path / "unused",
        listen="127.0.0.1:0",
        grace_seconds=0.2,
    )
    async with serving(settings) as address, grpc.aio.insecure_channel(address) as channel:
        await eventually(lambda: is_serving(channel), "health is up")
        stub = pb_grpc.TokenServiceStub(channel)
        timely: Any = {"timeout": 10}
        of: dict[str, Any] = {"account_id": "acme"}
        created = await stub.Create(pb.CreateRequest(**of, name="a", scope=pb.SCOPE_READ), **timely)
        this: dict[str, Any] = {**of, "id": created.token.id}
        question = pb.VerifyRequest(secret=created.secret)
        assert (await stub.Verify(question, **timely)).verdict == pb.VERDICT_VALID
        await stub.Disable(pb.DisableRequest(**this), **timely)
        await stub.Enable(pb.EnableRequest(**this), **timely)
        secret = (await stub.Rotate(pb.RotateRequest(**this), **timely)).secret
        await stub.List(pb.ListRequest(**of), **timely)
        await stub.RevokeSecret(pb.RevokeSecretRequest(secrets=[secret]), **timely)
        await stub.Delete(pb.DeleteRequest(**this), **timely)
        await stub.DeleteAll(pb.DeleteAllRequest(**of), **timely)
        audit: Any = audit_pb_grpc.AuditServiceStub(channel)
        page = await audit.List(audit_pb.AuditServiceListRequest(method="Delete"), **timely)
        assert [entry.token_id for entry in page.entries] == [created.token.id]
    await sealer.seal()
    assert sealer.head.number == 2
    assert await sealer.purge(datetime.now(UTC) - timedelta(days=2), 100) == 1
    await pool.close()


FORBIDDEN = [
    "UPDATE audit SET caller = 'x'",
    "DELETE FROM audit",
    "SET latchkey.audit_retention = 'on'; DELETE FROM audit",
    "TRUNCATE audit",
    "ALTER TABLE audit DISABLE TRIGGER ALL",
    "DROP TRIGGER audit_keep_rows ON audit",
    "CREATE OR REPLACE FUNCTION audit_keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN END'",
    "SET session_replication_role = replica",
    "DROP TABLE audit",
    "UPDATE audit_chain SET digest = ''",
    "DELETE FROM audit_chain",
    # These would stop the sealing and the retention.
    "INSERT INTO audit_chain VALUES (9223372036854775807, '{}', '', 'p', '', now())",
    "INSERT INTO audit_chain VALUES (1, '{}', '', 'p', '', 'infinity')",
    """
    CREATE TEMP TABLE audit_chain (number bigint);
    INSERT INTO pg_temp.audit_chain VALUES (8);
    INSERT INTO public.audit_chain VALUES (9, '{}', '', 'p', '', now());
    """,
    "UPDATE audit_start SET number = 1",
    "INSERT INTO audit_unsealed VALUES (1)",
    "ALTER TABLE token ADD COLUMN x int",
    "CREATE TABLE mine ()",
    "DELETE FROM schema_migration",
    "SET ROLE latchkey",
]


async def test_the_service_cannot_change_the_audit_log(service_url: str) -> None:
    """The service's role can neither change nor remove an entry, nor switch off what protects them.
    What it can remove through the function of retention is older than a day."""
    pool = await Pool.open(Connector(service_url))
    await AuditTable(pool).insert([NewEntry(datetime.now(UTC), "a", "m", "", "", "", "", 0, "", 1)])
    await pool.close()
    async with session(service_url) as connection:
        for statement in FORBIDDEN:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)
            await connection.execute("RESET ALL")
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="one day at least"):
            await connection.execute("SELECT audit_prune(now(), 1, '', '')")
        # The function does not take a table of the caller for the real one.
        await connection.execute(
            "CREATE TEMP TABLE audit_chain (number bigint, entry_ids bigint[], time timestamptz);"
            "INSERT INTO pg_temp.audit_chain SELECT 1, array_agg(id), '2000-01-01' FROM audit"
        )
        removed = await connection.fetchval(
            "SELECT audit_prune(now() - interval '2 days', 1, '', '')"
        )
        assert removed == 0
        assert await connection.fetchval("SELECT count(*) FROM audit") == 1


async def test_a_missing_migration_names_the_command(service_url: str, node: Node) -> None:
    """A service that may not migrate says how to, and starts after its owner has."""
    more = [*bundled(), Migration(9_999, "more", "CREATE TABLE more (n int)")]
    with pytest.raises(MigrationError, match="latchkey migrate --grant"):
        await migrate(service_url, more)
    await migrate(node.url, more, service_role="service")
    assert await migrate(service_url, more) == []
    async with session(service_url) as connection:
        await connection.execute("INSERT INTO more VALUES (1)")


@pytest.mark.parametrize(
    ("role", "problem"),
    [
        ("nobody", "there is no role"),
        ("latchkey", "owns the tables"),
        ("postgres", "is a superuser"),
        ("member", "a member of their owner"),
    ],
)
async def test_rights_that_protect_nothing_are_refused(node: Node, role: str, problem: str) -> None:
    """The command refuses a role that could change the tables anyway."""
    await node.execute("CREATE ROLE member LOGIN IN ROLE latchkey")
    with pytest.raises(MigrationError, match=problem):
        await migrate(node.url, bundled(), service_role=role)


async def test_commands(
    node: Node, node_template: Template, pepper_file: Path, tmp_path: Path, forked: Forked
) -> None:
    """`migrate --grant` prepares a database, and `audit verify` reports what is wrong with the log,
    with an exit code for programs."""

    async def command(*arguments: str, **settings: str) -> tuple[int | None, str]:
        """Run a command of the service as people do; return its exit code and output."""
        process = await asyncio.create_subprocess_exec(
            *forked("latchkey_service", *arguments),
            cwd=tmp_path,
            env={**os.environ, **{f"LATCHKEY_{k.upper()}": v for k, v in settings.items()}},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        async with asyncio.timeout(COMMAND_SECONDS_MAX):
            output, _ = await process.communicate()
        return process.returncode, output.decode()

    await node.execute(f"CREATE ROLE service LOGIN PASSWORD '{node_template.password}'")
    owner = {"database_url": node.url, "pepper_file": str(pepper_file)}
    service = {**owner, "database_url": node.url_at(node.address, role="service")}
    code, output = await command("migrate", "--grant", "service", **owner)
    assert code == 0
    assert "applied migration 0001 (tokens)" in output
    assert "granted the rights of the service to service" in output
    pool = await Pool.open(Connector(service["database_url"]))
    sealer = AuditSealer(
        ChainTable(pool), ChainKeys(pepper_files.load(pepper_file)), lambda: 0.0, lambda: 0.0
    )
    entry = NewEntry(datetime.now(UTC), "a", "m", "", "", "", "", 0, "", 1)
    for _ in range(2):
        await AuditTable(pool).insert([entry])
        await sealer.seal()
    await pool.close()
    code, output = await command("audit", "verify", **service)
    assert (code, output.splitlines()[-2:]) == (
        0,
        ["2 entries in 2 batches are intact", f"newest batch: {sealer.head}"],
    )
    noted = ("--noted", str(sealer.head))
    assert (await command("audit", "verify", *noted, **service))[0] == 0
    async with node.session() as connection:
        await connection.execute("SET session_replication_role = replica")
        await connection.execute("DELETE FROM audit WHERE id = 2")
        await connection.execute("DELETE FROM audit_chain WHERE number = 2")
    assert (await command("audit", "verify", **service))[0] == 0
    code, output = await command("audit", "verify", *noted, **service)
    assert (code, output.splitlines()[0]) == (1, "WRONG: batch 2, which was noted, is gone")
    code, output = await command("audit", "verify", "--noted", "x", **service)
    assert code == 2
    assert "NUMBER:DIGEST" in output
