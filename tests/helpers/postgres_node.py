"""One Postgres cluster with the embedded binaries, for tests that break and restore databases.

A test drives each step itself and waits until Postgres reports its effect: nothing here fails
over automatically. Nodes listen on loopback with SCRAM, even when the tests run as root. Call
`Node.start` on the main thread: Linux ends a postmaster together with the thread that started
it.
"""

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import asyncpg
import psutil
from latchkey_service.postgres.embedded_host import (
    OsAccount,
    choose_account,
    reachable_programs,
    spawn,
)

from tests.helpers.free_ports import free_port
from tests.helpers.waiting import eventually

__all__ = [
    "HOST",
    "POSTGRES_SECONDS_MAX",
    "STANDBY",
    "Node",
    "Template",
    "lone_node",
    "make_template",
    "new_folder",
]

HOST: Final = "127.0.0.1"
# The name in a primary's `synchronous_standby_names`.
STANDBY: Final = "standby"
# initdb, pg_basebackup and a start with crash recovery take one or two seconds on an idle machine.
POSTGRES_SECONDS_MAX: Final = 60.0
CONNECT_SECONDS_MAX: Final = 5.0
_SETTINGS: Final = {
    "max_connections": "150",
    "shared_buffers": "32MB",
    # In the data directory. A killed server leaves its segment, which elsewhere nobody removes.
    "dynamic_shared_memory_type": "mmap",
    # Written data survives a killed process. No test crashes the machine, and with fsync on, start,
    # backup and restore take several times as long.
    "fsync": "off",
    # Its commits would flush other transactions' WAL at times that the test does not control.
    "autovacuum": "off",
    # The default of 5 s only makes tests slow.
    "wal_retrieve_retry_interval": "100ms",
    # A standby that reconnects needs the segment in which it stopped. A checkpoint would remove it,
    # because the standby has no slot.
    "wal_keep_size": "64MB",
    # Statements are recognised by words anywhere in them.
    "track_activity_query_size": "16kB",
}
_READY: Final = "database system is ready to accept"

Stop = Literal["fast", "immediate"]


class Template:
    """A stopped cluster that nodes are copied from, with the role and database `latchkey`."""

    def __init__(self, folder: Path) -> None:
        self.data: Final = folder / "template"
        self.account: Final = choose_account(self.data)
        self.programs: Final = reachable_programs(folder, self.account)
        # The package's programs, which this user can run although `account` may be unable to.
        self.own_account: Final = OsAccount(os.geteuid(), os.getegid())
        self.own_programs: Final = reachable_programs(folder, self.own_account)
        self.password: Final = secrets.token_hex(16)
        """The password of the roles `latchkey` and `postgres`."""


async def make_template(folder: Path) -> Template:
    """Make a template in `folder`, which the account that Postgres runs as must be able to enter.

    Takes one or two seconds, so make one for each test session.
    """
    template = Template(folder)
    password_file = folder / "template.password"
    password_file.touch(0o600)
    password_file.write_text(template.password)
    template.data.mkdir(0o700)
    for path in (template.data, password_file):
        os.chown(path, template.account.uid, template.account.gid)
    await _run(
        [
            *(f"{template.programs}/initdb", f"--pgdata={template.data}", "--username=postgres"),
            *(f"--pwfile={password_file}", "--auth=scram-sha-256", "--encoding=UTF8"),
            *("--locale=C", "--no-instructions", "--no-sync", "--wal-segsize=1"),
            *(f"--set={name}={value}" for name, value in _SETTINGS.items()),
        ],
        template.account,
        folder / "template.log",
    )
    node = Node("template", template, folder, database="template1")
    await node.start()
    try:
        # Each database is 300 files and 8 MB to copy.
        for statement in (
            f"CREATE ROLE latchkey LOGIN PASSWORD '{template.password}'",
            "ALTER DATABASE postgres RENAME TO latchkey",
            "ALTER DATABASE latchkey OWNER TO latchkey",
            "ALTER DATABASE template0 IS_TEMPLATE false",
            "DROP DATABASE template0",
        ):
            await node.execute(statement)
    finally:
        await node.stop()
    return template


class Node:
    """One Postgres cluster and its postmaster. It keeps its port and its log across restarts."""

    def __init__(
        self, name: str, template: Template, folder: Path, database: str = "latchkey"
    ) -> None:
        self.name: Final = name
        self.data: Final = folder / name
        self.log_path: Final = folder / f"{name}.log"
        self.port: Final = free_port()
        self._template: Final = template
        self._database: Final = database
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"{HOST}:{self.port}"

    @property
    def url(self) -> str:
        """Return the database's URL for the service's role, on this node only."""
        return self.url_at(self.address)

    def url_at(self, *addresses: str, role: str = "latchkey") -> str:
        """Return the URL of the database at other addresses: a link's, or several nodes'."""
        password = self._template.password
        return f"postgresql://{role}:{password}@{','.join(addresses)}/latchkey?sslmode=disable"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        return self.log_path.read_text("utf-8", "replace")

    async def make(self) -> None:
        """Fill this node with a copy of the template."""
        await self.copy_from(self._template.data)

    async def copy_from(self, source: Path) -> None:
        """Replace this stopped node's data by a copy of a stopped cluster or of a backup."""
        assert not self.running
        # In a thread, because links carry bytes meanwhile.
        await asyncio.to_thread(self._copy_from, source)

    def _copy_from(self, source: Path) -> None:
        shutil.rmtree(self.data, ignore_errors=True)
        shutil.copytree(source, self.data)
        self._give_away()

    async def move_from(self, source: Path) -> None:
        """Replace this stopped node's data by a backup that is not needed afterwards."""
        assert not self.running
        await asyncio.to_thread(self._move_from, source)

    def _move_from(self, source: Path) -> None:
        shutil.rmtree(self.data, ignore_errors=True)
        source.rename(self.data)
        self._give_away()

    def _give_away(self) -> None:
        """Change the owner of the data to the account that Postgres runs as."""
        account = self._template.account
        for path in (self.data, *self.data.rglob("*")):
            os.chown(path, account.uid, account.gid)
        self.data.chmod(0o700)

    async def start(self) -> None:
        """Start the postmaster and wait until it accepts connections, after crash recovery if
        necessary."""
        assert not self.running
        argv = [
            *(f"{self._template.programs}/postgres", "-D", str(self.data), "-p", str(self.port)),
            *("-c", f"listen_addresses={HOST}", "-c", "unix_socket_directories="),
            *("-c", f"cluster_name={self.name}"),
        ]
        with self.log_path.open("ab") as log:
            self._process = spawn(argv, self._template.account, log, signal.SIGINT, {})
        await eventually(self._answers, f"{self.name} accepts connections", POSTGRES_SECONDS_MAX)

    async def _answers(self) -> bool:
        if not self.running:
            # Not an AssertionError, which would count as "not yet".
            raise RuntimeError(f"{self.name} has ended: {self.log[-2000:]}")
        return await self._try("SELECT true") is True

    async def stop(self, mode: Stop = "fast") -> None:
        """Stop it: `fast` writes a checkpoint, after `immediate` the next start recovers."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT if mode == "fast" else signal.SIGQUIT)
        await self._ended()

    async def kill(self) -> None:
        """SIGKILL the postmaster, and then the processes that it leaves behind.

        Data that was only in their shared memory is lost, as in a crash of the machine.
        """
        assert self._process is not None
        children = psutil.Process(self._process.pid).children(recursive=True)
        self._process.kill()
        await self._ended()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        await eventually(
            lambda: not any(map(_runs, children)),
            f"the processes of {self.name} are gone",
            POSTGRES_SECONDS_MAX,
        )
        # No process holds the data any more, and another process may have that pid at the next
        # start.
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    async def _ended(self) -> None:
        process = self._process
        assert process is not None
        await eventually(
            lambda: process.poll() is not None, f"{self.name} has ended", POSTGRES_SECONDS_MAX
        )
        self._process = None

    def configure(self, **settings: str) -> None:
        """Apply these settings on top of the template's, instead of those of the last call."""
        path = self.data / "postgresql.auto.conf"
        quoted = ((name, value.replace("'", "''")) for name, value in settings.items())
        path.write_text("".join(f"{name} = '{value}'\n" for name, value in quoted))
        if self._process is not None:
            self._process.send_signal(signal.SIGHUP)

    def processes(self, kind: str) -> list[psutil.Process]:
        """Return its processes whose titles contain `kind`, such as "walwriter"."""
        assert self._process is not None
        found = []
        for child in psutil.Process(self._process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if kind in " ".join(child.cmdline()):
                    found.append(child)
        return found

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
        """Open a superuser's connection to the database, under an application name other than the
        service's."""
        connection = await asyncpg.connect(
            self.url_at(self.address, role="postgres"),
            database=self._database,
            timeout=CONNECT_SECONDS_MAX,
            command_timeout=CONNECT_SECONDS_MAX,
            server_settings={"application_name": "test"},
        )
        try:
            yield connection
        finally:
            connection.terminate()

    async def fetchval(self, query: str, *arguments: object) -> Any:
        """Run a query as superuser and return its first value."""
        async with self.session() as connection:
            return await connection.fetchval(query, *arguments)

    async def execute(self, statement: str) -> None:
        """Run a statement as superuser, without waiting for the standby."""
        async with self.session() as connection:
            await connection.execute("SET synchronous_commit = local")
            await connection.execute(statement)

    async def _try(self, query: str) -> Any:
        """Return the first value of a query, or None while Postgres does not answer."""
        with contextlib.suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return await self.fetchval(query)
        return None

    async def waiting_commits(self, statement: str = "") -> list[int]:
        """Return the pids of the backends that wait for the standby at the end of a statement which
        contains these words."""
        pids = await self.fetchval(
            "SELECT array_agg(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
            " AND application_name <> 'test' AND position($1 IN query) > 0",
            statement,
        )
        return pids or []

    async def cancel_waiting_commits(self, statement: str = "") -> None:
        """Cancel the waits for the standby: the commits become visible on this node alone."""
        for pid in await self.waiting_commits(statement):
            await self.fetchval("SELECT pg_cancel_backend($1)", pid)

    async def crash_waiting_commit(self, statement: str = "") -> None:
        """SIGKILL a backend whose commit waits for the standby, and wait for the crash recovery,
        which makes the commit visible on this node alone."""

        async def waiting() -> list[int]:
            return await self.waiting_commits(statement)

        pids = await eventually(waiting, "a commit waits for the standby")
        done = self.log.count(_READY)
        os.kill(pids[0], signal.SIGKILL)
        await eventually(
            lambda: self.log.count(_READY) > done,
            f"{self.name} has recovered",
            POSTGRES_SECONDS_MAX,
        )
        await eventually(self._answers, f"{self.name} accepts connections", POSTGRES_SECONDS_MAX)

    async def promote(self) -> None:
        """Promote a standby and wait until it accepts writes. Fences no other node."""
        await self.fetchval("SELECT pg_promote(wait => false)")
        await eventually(self._is_primary, f"{self.name} is promoted", POSTGRES_SECONDS_MAX)

    async def _is_primary(self) -> bool:
        return await self._try("SELECT NOT pg_is_in_recovery()") is True

    async def back_up(self, target: Path) -> None:
        """Write a base backup of this running node to `target`, as pg_basebackup does."""
        await _run(
            [
                *(f"{self._template.own_programs}/pg_basebackup", f"--pgdata={target}"),
                *("--host", HOST, "--port", str(self.port), "--username=postgres"),
                *("--checkpoint=fast", "--wal-method=stream", "--no-sync"),
            ],
            self._template.own_account,
            target.with_name(f"{target.name}.log"),
            {"PGPASSWORD": self._template.password},
        )

    async def flush(self) -> None:
        """Make everything durable that was committed so far, even without synchronous_commit."""
        await self.execute("SELECT pg_logical_emit_message(true, 'test', '')")

    async def restore(self, backup: Path, *, new_timeline: bool, **recovery: str) -> None:
        """Stop, replace the data by a base backup, and start on the same address.

        With `new_timeline`, the timeline changes, as in an archive recovery. Otherwise it stays the
        same, as after a plain copy, so that only the content shows the restore. `recovery` are
        settings of the archive recovery; without them, there is no archive.
        """
        # Its data is replaced, so it need not write a checkpoint.
        await self.stop("immediate")
        await self.copy_from(backup)
        if new_timeline:
            # Without an archive, the backup contains all the WAL that it needs.
            self.configure(**({"restore_command": "exit 1"} | recovery))
            self._signal_file("recovery.signal")
        else:
            self.configure()
        await self.start()
        await eventually(self._is_primary, f"{self.name} is restored", POSTGRES_SECONDS_MAX)

    def follow(self, port: int) -> None:
        """Make this stopped node a standby of the primary at `port`."""
        self.configure(
            primary_conninfo=f"host={HOST} port={port} user=postgres sslmode=disable"
            f" gssencmode=disable password={self._template.password} application_name={STANDBY}"
        )
        self._signal_file("standby.signal")

    def _signal_file(self, name: str) -> None:
        path = self.data / name
        path.touch()
        os.chown(path, self._template.account.uid, self._template.account.gid)


@contextlib.asynccontextmanager
async def lone_node(folder: Path, template: Template) -> AsyncIterator[Node]:
    """Run a node without a standby below `folder`, and end it in any case."""
    node = Node("lone", template, new_folder(folder, "lone-"))
    try:
        await node.make()
        await node.start()
        yield node
    finally:
        if node.running:
            await node.kill()
        await asyncio.to_thread(shutil.rmtree, node.data.parent, ignore_errors=True)


def new_folder(parent: Path, prefix: str) -> Path:
    """Make a folder that the account which Postgres runs as can enter, as it can enter `parent`."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    folder.chmod(0o755)
    return folder


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def _run(
    argv: Sequence[str], account: OsAccount, log_path: Path, extra: dict[str, str] | None = None
) -> None:
    """Run a program to its end. Raises AssertionError if it fails."""
    with log_path.open("ab") as log:
        process = spawn(argv, account, log, signal.SIGKILL, extra or {})
    try:
        await eventually(lambda: process.poll() is not None, argv[0], POSTGRES_SECONDS_MAX)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, f"{argv[0]} has failed; see {log_path}"
