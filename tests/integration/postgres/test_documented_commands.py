"""The commands for operators in the documents, run as printed on a Postgres with two roles.

The tests replace only names that they cannot share: the database, its address and its passwords.
"""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING, Any

import asyncpg
import grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.helpers.calls import is_serving
from tests.helpers.documented import marked, paste
from tests.helpers.programs import missing
from tests.helpers.service_process import service
from tests.helpers.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from tests.helpers.postgres_node import Node, Template
# A shell must not take it apart.
ACCOUNT = "auth0|5f7c8e"


async def two_roles(node: Node, node_template: Template, tmp_path: Path) -> tuple[str, str]:
    """Set up a database as docs/postgres.md says. Return the URLs of the owner and the service."""
    statements, grant = marked("docs/postgres.md", "two roles")
    # The tests' cluster has a database `latchkey`, and no `template0`.
    await node.execute("CREATE DATABASE template0 TEMPLATE template1 IS_TEMPLATE true")
    for statement in statements.replace("…", node_template.password).split(";")[:-1]:
        await node.execute(statement.replace("DATABASE latchkey", "DATABASE printed"))
    owner, user = (
        node.url_at(node.address, role=role).replace("/latchkey?", "/printed?")
        for role in ("latchkey_owner", "latchkey_service")
    )
    printed = "postgresql://latchkey_owner@db1/latchkey "
    assert grant.count(printed) == 1
    said = await paste(grant.replace(printed, f"'{owner}' "), tmp_path)
    assert "granted the rights of the service to latchkey_service\n" in said
    return owner, user


async def test_two_roles_and_migrations(
    node: Node, node_template: Template, tmp_path: Path
) -> None:
    """The statements and commands of the pages about Postgres and migrations work one after
    another: the owner migrates, and the check then finds nothing missing."""
    owner, _ = await two_roles(node, node_template, tmp_path)
    (commands,) = marked("docs/migrations.md", "migrate")
    file = tmp_path / "owner-url"
    file.write_text(owner)
    file.chmod(0o600)
    assert commands.count("/run/secrets/owner-url") == 3
    said = await paste(commands.replace("/run/secrets/owner-url", str(file)), tmp_path)
    assert "GRANT SELECT, INSERT ON" in said
    assert said.endswith("granted the rights of the service to latchkey_service\n")


async def test_log_and_audit_log(
    node: Node, node_template: Template, pepper_file: Path, tmp_path: Path
) -> None:
    """The printed filter finds the deletions in a service's log, and the lines that it writes
    repeat them. The audit log is then found intact, in the printed words."""
    if shutil.which("jq") is None:
        missing("not installed here: jq")
    _, user = await two_roles(node, node_template, tmp_path)
    settings = {
        "database_url": user,
        "pepper_file": pepper_file,
        "listen": "127.0.0.1:0",
        "log_format": "json",
    }
    with service(tmp_path / "service", **settings) as running:
        address = await running.welcome()
        async with grpc.aio.insecure_channel(address) as channel:
            await eventually(lambda: is_serving(channel), "health is up")
            stub: Any = pb_grpc.TokenServiceStub(channel)
            request = pb.CreateRequest(account_id=ACCOUNT, name="export", scope=pb.SCOPE_READ)
            created = await stub.Create(request, timeout=10)
            delete = pb.DeleteRequest(account_id=ACCOUNT, id=created.token.id)
            await stub.Delete(delete, timeout=10)
        # A separate thread writes the log.
        await eventually(
            lambda: any("TokenService/Delete" in line for line in running.err.splitlines()),
            "the deletion is in the log",
        )
        (tmp_path / "latchkey.log").write_text(
            "".join(line for line in running.err.splitlines(keepends=True) if line[0] == "{")
        )
        (command,) = marked("docs/backup.md", "lost deletions")
        found = await paste(command, tmp_path)
        assert found == f"latchkey delete --yes --account '{ACCOUNT}' '{created.token.id}'\n"
        assert "Deleted " in await paste(found, tmp_path, LATCHKEY_TARGET=address)

        async def sealed() -> bool:
            connection = await asyncpg.connect(user)
            try:
                return not await connection.fetchval("SELECT count(*) FROM audit_unsealed")
            finally:
                await connection.close()

        await eventually(sealed, "all entries are sealed")
        assert await running.end() == 0
    (printed,) = marked("docs/callers.md", "audit verify")
    command, *lines = printed.splitlines()
    said = await paste(
        command.removeprefix("$ "),
        tmp_path,
        LATCHKEY_DATABASE_URL=user,
        LATCHKEY_PEPPER_FILE=str(pepper_file),
    )
    assert general(said.splitlines()[-2:]) == general(lines)


def general(lines: list[str]) -> list[str]:
    """Return these lines without their figures and their hash, which the page shortens."""
    return [re.sub(r"\d+", "N", re.sub(r"(?<=:)[0-9a-f]+(…|\b)", "H", line)) for line in lines]
