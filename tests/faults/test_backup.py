"""A backup is restored as docs/backup.md says, with servers and client libraries running.

Two hosts of the service run as their users run them, with a client library on each, and all of them
verify without a pause while the database is replaced.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

import asyncpg
import latchkey
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.faults.host import (
    RECOVERY_SECONDS_MAX,
    Host,
    TwoHosts,
    client_refuses,
    client_remembers,
    two_hosts,
)
from tests.helpers.postgres_node import (
    HOST,
    POSTGRES_SECONDS_MAX,
    Node,
    Template,
    lone_node,
    new_folder,
)
from tests.helpers.waiting import WAIT_SECONDS, eventually

pytestmark = pytest.mark.slow("restores backups under a running service")

LEASE_SECONDS = 3.0
# Between verifies of one loop: often enough to hit each moment, and bearable for a busy machine.
VERIFY_SECONDS = 0.02
RESTORE_POINT = "before the mistake"


@pytest.fixture
async def node(scratch: Path, pair_template: Template) -> AsyncIterator[Node]:
    """A Postgres without a standby."""
    async with lone_node(scratch, pair_template) as made:
        yield made


class Watched:
    """Verifies secrets on every host and in every client library until its block ends."""

    def __init__(self, hosts: list[Host], verifiers: list[latchkey.Verifier]) -> None:
        self.hosts = hosts
        self.verifiers = verifiers
        self._secrets: list[str] = []
        # By secret: the start of the last verify that returned VALID.
        self._accepted: dict[str, float] = {}
        self._dead: dict[str, float] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def watch(self, *created: pb.CreateResponse) -> None:
        """Verify these tokens from now on."""
        self._secrets += [c.secret for c in created]

    def die(self, *created: pb.CreateResponse) -> None:
        """Record that every verify that starts from now on must refuse these tokens."""
        self._dead |= dict.fromkeys([c.secret for c in created], time.monotonic())

    def check(self) -> None:
        """Fail if a verify that started after a token's death returned VALID."""
        for task in self._tasks:
            if task.done():
                task.result()
        late = {
            secret: self._accepted[secret] - dead
            for secret, dead in self._dead.items()
            if self._accepted.get(secret, dead) > dead
        }
        assert not late

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._ask_host(host)) for host in self.hosts]
        self._tasks += [asyncio.create_task(self._ask_client(v)) for v in self.verifiers]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ask_host(self, host: Host) -> None:
        while True:
            for secret in tuple(self._secrets):
                start = time.monotonic()
                if await host.verdict(secret) == "VALID":
                    self._accept(secret, start)
            await asyncio.sleep(VERIFY_SECONDS)

    async def _ask_client(self, verifier: latchkey.Verifier) -> None:
        while True:
            for secret in tuple(self._secrets):
                start = time.monotonic()
                answer = verifier.verify_nowait(secret)
                if answer is not None and answer.allowed:
                    self._accept(secret, start)
                start = time.monotonic()
                with contextlib.suppress(latchkey.Unavailable, latchkey.DeadlineExceeded):
                    if (await verifier.verify(secret)).allowed:
                        self._accept(secret, start)
            await asyncio.sleep(VERIFY_SECONDS)

    def _accept(self, secret: str, start: float) -> None:
        self._accepted[secret] = max(self._accepted.get(secret, start), start)


@contextlib.asynccontextmanager
async def watched(hosts: TwoHosts) -> AsyncIterator[Watched]:
    """Verify on both hosts and in a client library of each."""
    async with (
        latchkey.Verifier(hosts.deleter.address, timeout_seconds=5) as first,
        latchkey.Verifier(hosts.other.address, timeout_seconds=5) as second,
        Watched([hosts.deleter, hosts.other], [first, second]) as made,
    ):
        yield made


async def all_remember(made: Watched, *created: pb.CreateResponse) -> None:
    """Wait until every host and client library answers VALID for these tokens, the clients from
    their caches."""
    for one in created:
        for running in made.hosts:
            await running.answers(one.secret, "VALID")
        for verifier in made.verifiers:
            await client_remembers(verifier, one.secret)


async def all_refuse(made: Watched, secret: str, verdict: str) -> None:
    """Wait until every host and client library returns this verdict; fail at a VALID."""
    for running in made.hosts:
        await running.refuses(secret, verdict)
    for verifier in made.verifiers:
        await client_refuses(verifier, secret, latchkey.Verdict[verdict])


async def all_accept(made: Watched, secret: str) -> None:
    for running in made.hosts:
        await running.answers(secret, "VALID")
    for verifier in made.verifiers:
        await client_remembers(verifier, secret)


async def invalidate_all(running: Host) -> latchkey.Receipt:
    """Run `latchkey invalidate-all` until it succeeds, as an operator would."""
    async with latchkey.Client(running.address) as client:

        async def done() -> latchkey.Receipt | None:
            with contextlib.suppress(latchkey.Unavailable, latchkey.DeadlineExceeded):
                return await client.invalidate_all()
            return None

        receipt: latchkey.Receipt = await eventually(
            done, "the memories are emptied", RECOVERY_SECONDS_MAX
        )
    return receipt


def deleted_by(running: Host) -> set[str]:
    """Return the IDs of the tokens that a host's log reports as deleted."""
    return {
        line["token_id"]
        for line in running.service.log
        if line["event"] == "call"
        and line["method"] == "/latchkey.v1.TokenService/Delete"
        and line["code"] == "OK"
    }


@pytest.mark.parametrize("new_timeline", [True, False], ids=["base backup", "file copy"])
async def test_a_restore_with_everything_running(
    node: Node, tmp_path: Path, pepper_file: Path, new_timeline: bool
) -> None:
    """A backup is restored at the address of the running cluster, on a new timeline, or on the same
    one as with a file-system snapshot. Once invalidate-all has returned, no verify accepts a token
    that was created after the backup. A deletion that the backup lacks is undone, is in the hosts'
    logs, and is final once repeated. Deletions after the restore work as usual. Tokens in the
    backup stay valid."""
    async with (
        two_hosts(node, tmp_path, pepper_file, lease_seconds=LEASE_SECONDS) as hosts,
        watched(hosts) as made,
    ):
        kept, doomed, lost = [await hosts.deleter.create() for _ in range(3)]
        await node.back_up(backup := tmp_path / "backup")
        ghost = await hosts.other.create()
        made.watch(kept, doomed, lost, ghost)
        await all_remember(made, kept, doomed, lost, ghost)
        await hosts.deleter.delete(lost.token)
        await all_refuse(made, lost.secret, "DELETED")
        await node.restore(backup, new_timeline=new_timeline)
        receipt = await invalidate_all(hosts.other)
        made.die(ghost)
        assert receipt.effective_time is not None
        assert receipt.verifiers_acknowledged >= 2
        await all_refuse(made, ghost.secret, "UNKNOWN")
        assert await hosts.other.delete_finds_nothing(ghost.token)
        await all_accept(made, lost.secret)
        assert lost.token.id in deleted_by(hosts.deleter)
        for repeated in (lost, doomed):
            await hosts.deleter.delete(repeated.token)
            made.die(repeated)
        for dead in (lost, doomed):
            await all_refuse(made, dead.secret, "DELETED")
        await all_accept(made, kept.secret)
        fresh = await hosts.other.create()
        await all_accept(made, fresh.secret)
        made.check()


async def test_a_restore_without_lost_deletions(
    node: Node, tmp_path: Path, pepper_file: Path
) -> None:
    """The restored file copy lacks tokens but no deletion, so neither the log nor the timeline
    shows the restore. Caches answer for a missing token until invalidate-all has returned, and not
    afterwards."""
    async with (
        two_hosts(node, tmp_path, pepper_file, lease_seconds=LEASE_SECONDS) as hosts,
        watched(hosts) as made,
    ):
        kept = await hosts.deleter.create()
        await node.back_up(backup := tmp_path / "backup")
        ghost = await hosts.other.create()
        made.watch(kept, ghost)
        await all_remember(made, kept, ghost)
        await node.restore(backup, new_timeline=False)
        # The reason for the command: without it no time limit can be promised.
        await hosts.other.answers(ghost.secret, "VALID")
        await invalidate_all(hosts.deleter)
        made.die(ghost)
        await all_refuse(made, ghost.secret, "UNKNOWN")
        await all_accept(made, kept.secret)
        made.check()


async def in_template(node: Node, *statements: str) -> None:
    """Run statements as superuser, connected to another database than the service's."""
    connection = await asyncpg.connect(
        node.url_at(node.address, role="postgres"), database="template1", timeout=WAIT_SECONDS
    )
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        connection.terminate()


async def run_program(template: Template, node: Node, name: str, *arguments: str) -> None:
    """Run one of Postgres' programs against the node, as superuser, until it ends."""
    process = await asyncio.create_subprocess_exec(
        *(f"{template.own_programs}/{name}", "--host", HOST, "--port", str(node.port)),
        *("--username", "postgres", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={"PGPASSWORD": template.password},
    )
    try:
        async with asyncio.timeout(POSTGRES_SECONDS_MAX):
            _, err = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert process.returncode == 0, err.decode()


async def test_a_dump_replaces_the_database(
    node: Node, pair_template: Template, tmp_path: Path, pepper_file: Path
) -> None:
    """A dump is restored into a new database of the same cluster, which is then renamed to the old
    name. The service is unavailable while the database rejects connections, and reports no fault of
    its own. Afterwards the same guarantees hold as after a restored backup."""
    async with (
        two_hosts(node, tmp_path, pepper_file, lease_seconds=LEASE_SECONDS) as hosts,
        watched(hosts) as made,
    ):
        kept, doomed = await hosts.deleter.create(), await hosts.deleter.create()
        dump = tmp_path / "latchkey.dump"
        await run_program(
            pair_template, node, "pg_dump", "--format=custom", f"--file={dump}", "latchkey"
        )
        ghost = await hosts.other.create()
        made.watch(kept, doomed, ghost)
        await all_remember(made, kept, doomed, ghost)
        await in_template(node, "CREATE DATABASE restored TEMPLATE template1 OWNER latchkey")
        await run_program(
            pair_template, node, "pg_restore", "--exit-on-error", "--dbname=restored", str(dump)
        )
        await in_template(
            node,
            "ALTER DATABASE latchkey ALLOW_CONNECTIONS false",
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'latchkey'",
        )
        for running in made.hosts:
            await running.answers(ghost.secret, "UNAVAILABLE")
        await in_template(
            node,
            "ALTER DATABASE latchkey RENAME TO before",
            "ALTER DATABASE restored RENAME TO latchkey",
        )
        await invalidate_all(hosts.other)
        made.die(ghost)
        await all_refuse(made, ghost.secret, "UNKNOWN")
        await hosts.deleter.delete(doomed.token)
        made.die(doomed)
        await all_refuse(made, doomed.secret, "DELETED")
        await all_accept(made, kept.secret)
        made.check()
        for running in made.hosts:
            faults = [line for line in running.service.log if "exception" in line]
            assert faults == []


@pytest.fixture
def archive(scratch: Path, pair_template: Template) -> Path:
    """An empty folder that Postgres can write WAL to."""
    folder = new_folder(scratch, "archive-")
    os.chown(folder, pair_template.account.uid, pair_template.account.gid)
    return folder


async def test_recovery_to_a_point_in_time(
    node: Node, archive: Path, tmp_path: Path, pepper_file: Path
) -> None:
    """The database is recovered from archived WAL to a point after the base backup. Changes before
    that point are kept: a token created after the backup is valid, and a deletion made after the
    backup is final. A token created after the point is dead once invalidate-all has returned."""
    await node.stop()
    node.configure(archive_mode="on", archive_command=f"cp %p {archive}/%f")
    await node.start()
    async with (
        two_hosts(node, tmp_path, pepper_file, lease_seconds=LEASE_SECONDS) as hosts,
        watched(hosts) as made,
    ):
        kept, doomed = await hosts.deleter.create(), await hosts.deleter.create()
        await node.back_up(backup := tmp_path / "backup")
        included = await hosts.deleter.create()
        made.watch(kept, doomed, included)
        await all_remember(made, kept, doomed, included)
        await hosts.deleter.delete(doomed.token)
        made.die(doomed)
        await node.fetchval("SELECT pg_create_restore_point($1)::text", RESTORE_POINT)
        ghost = await hosts.other.create()
        made.watch(ghost)
        await all_remember(made, ghost)
        last = await node.fetchval("SELECT pg_walfile_name(pg_switch_wal())")

        async def archived() -> bool:
            name = await node.fetchval("SELECT last_archived_wal FROM pg_stat_archiver")
            return name is not None and name[:24] >= last

        await eventually(archived, "the WAL is archived", POSTGRES_SECONDS_MAX)
        await node.restore(
            backup,
            new_timeline=True,
            restore_command=f"cp {archive}/%f %p",
            recovery_target_name=RESTORE_POINT,
            recovery_target_action="promote",
        )
        await invalidate_all(hosts.deleter)
        made.die(ghost)
        await all_refuse(made, ghost.secret, "UNKNOWN")
        await all_refuse(made, doomed.secret, "DELETED")
        await all_accept(made, included.secret)
        await all_accept(made, kept.secret)
        await hosts.other.delete(included.token)
        made.die(included)
        await all_refuse(made, included.secret, "DELETED")
        made.check()
