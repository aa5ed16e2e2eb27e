"""Postgres servers that Patroni runs with the embedded binaries, and etcd as its store.

Owns their processes, their configuration, and the faults injected into them. Patroni alone decides
which server is the primary. The programs `patroni` and `etcd` come from PATH.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import asyncpg
import psutil
from latchkey_service.postgres.embedded_host import (
    OsAccount,
    _probe,
    choose_account,
    is_postmaster,
    reachable_programs,
    spawn,
)

from tests.helpers.free_ports import free_port
from tests.helpers.waiting import eventually
from tests.history.proxy import Fault, Proxy

__all__ = [
    "HEALTHY_SECONDS_MAX",
    "HOST",
    "SUCCESSOR_SECONDS_MAX",
    "Patroni",
    "PatroniNode",
    "missing",
    "patroni",
    "version_of",
]

HOST: Final = "127.0.0.1"
# Patroni's minimum; a lost primary is replaced after this time. Its default is 30.
TTL_SECONDS: Final = 20
# initdb and two base backups one after another, or a demotion, a rewind and a restart.
HEALTHY_SECONDS_MAX: Final = 120.0
# The time to live, one round of Patroni's loop, and a margin for a busy machine.
SUCCESSOR_SECONDS_MAX: Final = TTL_SECONDS + 40.0
API_SECONDS_MAX: Final = 2.0
# The answer to a switchover comes when it is complete.
SWITCHOVER_SECONDS_MAX: Final = 60.0
END_SECONDS_MAX: Final = 40.0
# Before this version, Patroni keeps an outdated copy of what etcd holds if it misses a message. It
# then cannot change the synchronous standby, and logs "Synchronous replication key updated by
# someone else" for ever. Debian 12 has 3.0.2.
VERSION_MIN: Final = (3, 1)
_PROGRAMS: Final = ("pg_ctl", "pg_basebackup", "pg_rewind", "pg_controldata", "pg_isready")


def missing() -> str | None:
    """Return one sentence about a missing program, or None."""
    if shutil.which("etcd") is None:
        return "etcd is not on PATH: apt install etcd-server."
    if (command := shutil.which("patroni")) is None:
        return "patroni is not on PATH: pip install 'patroni[etcd3]' 'psycopg[binary]'."
    shown = _version(command)
    if version_of(shown) < VERSION_MIN:
        least = ".".join(map(str, VERSION_MIN))
        return f"{command} is {shown}, which can stop replacing standbys: install {least} or later."
    account = choose_account(Path("/nonexistent"))
    if (reason := _probe([command, "--version"], account)) is not None:
        return (
            f"uid {account.uid}, which Postgres runs as, cannot run {command} ({reason}): install"
            " patroni for a Python, and in a directory, that every user can reach."
        )
    return None


class PatroniNode:
    """One server: Patroni and the Postgres that it starts and stops."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name: Final = name
        self.data: Final = folder / name
        self.config: Final = folder / f"{name}.json"
        self.log_path: Final = folder / f"{name}.log"
        self.port: Final = free_port()
        self.api_port: Final = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self._frozen: list[psutil.Process] = []

    def postmaster(self) -> psutil.Process | None:
        """Return the process that Patroni started, if it is running."""
        with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
            pid = int((self.data / "postmaster.pid").read_text("utf-8").splitlines()[0])
            if is_postmaster(pid, self.data):
                return psutil.Process(pid)
        return None

    def kill_postgres(self) -> None:
        """SIGKILL the postmaster; its children end when they detect that."""
        postmaster = self.postmaster()
        assert postmaster is not None
        postmaster.kill()

    def freeze(self) -> None:
        """SIGSTOP everything on this node, as if its machine had stopped."""
        assert self.process is not None
        roots = [psutil.Process(self.process.pid), self.postmaster()]
        for root in roots:
            if root is None:
                continue
            root.suspend()
            self._frozen.append(root)
            for child in root.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.suspend()
                    self._frozen.append(child)

    def thaw(self) -> None:
        """SIGCONT all frozen processes."""
        for process in reversed(self._frozen):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        self._frozen = []

    async def end(self) -> None:
        """End Patroni, which stops its Postgres, and then all remaining processes."""
        self.thaw()
        if self.process is not None:
            self.process.terminate()
            try:
                await asyncio.to_thread(self.process.wait, END_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if (left := self.postmaster()) is not None:
            children = left.children(recursive=True)
            left.kill()
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()


class Patroni:
    """A Patroni cluster, created by `patroni`."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder: Final = folder
        self.nodes: Final = [PatroniNode(f"node-{n + 1}", folder) for n in range(nodes)]
        self._account: Final = choose_account(folder / "etcd")
        self._password: Final = secrets.token_hex(16)
        self._etcd: subprocess.Popen[bytes] | None = None
        self._etcd_port: Final = free_port()
        # Each node's connection to etcd, so that one can be cut off.
        self._proxy: Final = Proxy({}, random.Random(0))  # noqa: S311 - it delays nothing

    @property
    def versions(self) -> str:
        """Return the versions of the running programs, for the report."""
        return ", ".join(map(_version, ("patroni", "etcd")))

    def url(self, role: str = "latchkey", *nodes: PatroniNode, database: str = "latchkey") -> str:
        """Return a URL that lists these nodes, or all of them."""
        hosts = ",".join(f"{HOST}:{node.port}" for node in nodes or self.nodes)
        return f"postgresql://{role}:{self._password}@{hosts}/{database}?sslmode=disable"

    async def start(self) -> None:
        """Start etcd and all nodes, create the service's role and database, and wait."""
        programs = self._programs()
        await self._start_etcd()
        for node in self.nodes:
            way = await self._proxy.listen((HOST, self._etcd_port), node.name)
            self._configure(node, programs, way)
            command = shutil.which("patroni")
            assert command is not None
            with node.log_path.open("ab") as log:
                # Patroni's own path finds the libraries of its interpreter.
                extra = {"PATH": os.environ.get("PATH", os.defpath)}
                argv = [command, str(node.config)]
                node.process = spawn(argv, self._account, log, signal.SIGTERM, extra)
        leader = await self.healthy()
        connection = await asyncpg.connect(self.url("postgres", leader, database="postgres"))
        try:
            await connection.execute(f"CREATE ROLE latchkey LOGIN PASSWORD '{self._password}'")
            await connection.execute("CREATE DATABASE latchkey OWNER latchkey")
        finally:
            await connection.close()

    def _programs(self) -> Path:
        """Return a directory with all programs that Patroni calls."""
        programs = reachable_programs(self.folder, self._account)
        own = reachable_programs(self.folder, OsAccount(os.geteuid(), os.getegid()))
        for name in _PROGRAMS:
            if not (programs / name).exists():
                shutil.copy(own / name, programs / name)
                (programs / name).chmod(0o755)
        return programs

    async def _start_etcd(self) -> None:
        command = shutil.which("etcd")
        assert command is not None
        data = self.folder / "etcd"
        self._make_own(data)
        client, peer = f"http://{HOST}:{self._etcd_port}", f"http://{HOST}:{free_port()}"
        argv = [
            *(command, "--data-dir", str(data), "--listen-client-urls", client),
            *("--advertise-client-urls", client, "--listen-peer-urls", peer),
            *("--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}"),
        ]
        with (self.folder / "etcd.log").open("ab") as log:
            self._etcd = spawn(argv, self._account, log, signal.SIGKILL, {})

        async def answers() -> bool:
            health = await _ask(self._etcd_port, "/health")
            return health is not None and health.get("health") == "true"

        await eventually(answers, "etcd answers")

    def _make_own(self, directory: Path) -> None:
        directory.mkdir(0o700)
        os.chown(directory, self._account.uid, self._account.gid)

    def _configure(self, node: PatroniNode, programs: Path, etcd_port: int) -> None:
        """Write the node's configuration. JSON is YAML."""
        self._make_own(node.data)
        self._make_own(sockets := self.folder / f"{node.name}.run")
        accounts = {
            "superuser": {"username": "postgres", "password": self._password},
            "replication": {"username": "replicator", "password": self._password},
        }
        config = {
            "scope": "latchkey",
            "name": node.name,
            "restapi": {
                "listen": f"{HOST}:{node.api_port}",
                "connect_address": f"{HOST}:{node.api_port}",
            },
            # A proxy: otherwise Patroni would discover etcd's own address and connect to it.
            "etcd3": {"hosts": [f"{HOST}:{etcd_port}"], "use_proxies": True},
            "bootstrap": {
                "dcs": {
                    "ttl": TTL_SECONDS,
                    "loop_wait": 2,
                    "retry_timeout": 5,
                    # A crashed primary is replaced, not restarted.
                    "primary_start_timeout": 0,
                    "synchronous_mode": True,
                    "postgresql": {
                        "use_pg_rewind": True,
                        # A rewind that was interrupted leaves files that no server can use.
                        "remove_data_directory_on_rewind_failure": True,
                        "parameters": {"max_connections": 150, "shared_buffers": "32MB"},
                    },
                },
                "initdb": [
                    "data-checksums",
                    {"encoding": "UTF8"},
                    {"locale": "C"},
                    {"auth": "scram-sha-256"},
                ],
            },
            "postgresql": {
                "listen": f"{HOST}:{node.port}",
                "connect_address": f"{HOST}:{node.port}",
                "data_dir": str(node.data),
                "bin_dir": str(programs),
                "pgpass": str(sockets / "pgpass"),
                "authentication": accounts,
                "parameters": {"unix_socket_directories": str(sockets)},
                "pg_hba": [
                    "local all all scram-sha-256",
                    f"host all all {HOST}/32 scram-sha-256",
                    f"host replication replicator {HOST}/32 scram-sha-256",
                ],
            },
        }
        node.config.touch(0o600)
        node.config.write_text(json.dumps(config, indent=1))
        os.chown(node.config, self._account.uid, self._account.gid)

    async def members(self) -> list[dict[str, Any]]:
        """Return what a responding node reports about all members."""
        for node in self.nodes:
            answer = await _ask(node.api_port, "/cluster")
            if answer is not None:
                return list(answer["members"])
        return []

    async def leader(self) -> PatroniNode | None:
        """Return the primary, if the members agree on one that is running."""
        leaders = [
            member["name"]
            for member in await self.members()
            if member["role"] == "leader" and member["state"] == "running"
        ]
        return next((node for node in self.nodes if [node.name] == leaders), None)

    async def healthy(self) -> PatroniNode:
        """Wait until there is a primary, all others stream from its timeline, and one of them
        streams synchronously."""

        async def leader() -> PatroniNode | None:
            members = await self.members()
            standbys = [member for member in members if member["role"] != "leader"]
            streaming = [member for member in standbys if member["state"] == "streaming"]
            if len(streaming) != len(self.nodes) - 1:
                return None
            if not any(member["role"] == "sync_standby" for member in streaming):
                return None
            if not await self._one_timeline():
                return None
            return await self.leader()

        found: PatroniNode = await eventually(leader, "Patroni is healthy", HEALTHY_SECONDS_MAX)
        return found

    async def _one_timeline(self) -> bool:
        """Return whether all servers are on the same timeline now.

        A former primary streams for a moment before Patroni rewinds it. Another failover during the
        rewind would spoil its data.
        """
        answers = [await _ask(node.api_port, "/patroni") or {} for node in self.nodes]
        timelines = {answer.get("timeline") for answer in answers}
        return len(timelines) == 1 and None not in timelines

    async def successor(self, old: PatroniNode) -> PatroniNode:
        """Wait until another node than `old` is the primary."""

        async def leader() -> PatroniNode | None:
            found = await self.leader()
            return None if found is old else found

        found: PatroniNode = await eventually(
            leader, f"{old.name} is replaced", SUCCESSOR_SECONDS_MAX
        )
        return found

    async def switch_over(self, old: PatroniNode) -> None:
        """Make the primary hand over to its synchronous standby. Raises AssertionError."""
        answer = await asyncio.to_thread(
            _request,
            old.api_port,
            "/switchover",
            json.dumps({"leader": old.name}).encode(),
            SWITCHOVER_SECONDS_MAX,
        )
        assert answer is not None, "the switchover was refused"

    @contextlib.asynccontextmanager
    async def cut_off(self, node: PatroniNode) -> AsyncIterator[None]:
        """Cut a node off from etcd during the block. Its Postgres stays reachable."""
        async with self._proxy.fault(Fault(lambda c: c.tag == node.name, "swallow")):
            yield

    async def close(self) -> None:
        """End everything."""
        # One after another, because each stops its Postgres, which writes a checkpoint.
        for node in self.nodes:
            await node.end()
        await self._proxy.close()
        if self._etcd is not None:
            self._etcd.kill()
            self._etcd.wait()


@contextlib.asynccontextmanager
async def patroni(folder: Path, nodes: int) -> AsyncIterator[Patroni]:
    """Run a cluster in an existing folder, and always end it."""
    made = Patroni(folder, nodes)
    try:
        await made.start()
        yield made
    finally:
        await made.close()


def version_of(shown: str) -> tuple[int, ...]:
    """Return the version in the output of `patroni --version`, such as `patroni 4.1.5`."""
    return tuple(int(part) for part in re.findall(r"\d+", shown))


def _version(name: str) -> str:
    done = subprocess.run(
        [name, "--version"], capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.splitlines()[0]


async def _ask(port: int, path: str) -> dict[str, Any] | None:
    """Return a JSON answer, or None if there is none."""
    answer = await asyncio.to_thread(_request, port, path, None, API_SECONDS_MAX)
    with contextlib.suppress(ValueError):
        found = json.loads(answer or b"null")
        if isinstance(found, dict):
            return found
    return None


def _request(port: int, path: str, data: bytes | None, seconds: float) -> bytes | None:
    """Return the body of a successful answer, or None."""
    headers = {} if data is None else {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://{HOST}:{port}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:  # noqa: S310
            return bytes(response.read())
    except (OSError, urllib.error.URLError):
        return None
