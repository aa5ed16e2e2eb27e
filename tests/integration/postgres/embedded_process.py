"""Runs an embedded Postgres in a child process, and looks at clusters from outside."""

import asyncio
import contextlib
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
import psutil
import pytest

__all__ = [
    "IS_ROOT",
    "WAIT_SECONDS",
    "child",
    "is_gone",
    "mode",
    "needs_root",
    "query",
    "rows",
    "said",
    "socket_dir",
    "wait_until",
]


IS_ROOT = os.geteuid() == 0


WAIT_SECONDS = 20.0  # Far longer than any step here; only a failing test waits this long.


# Starts a server, reports that in one line of JSON, and stops it when standard input closes.
CHILD = """
import codecs, json, os, sys
from pathlib import Path
from latchkey_service.postgres import embedded_cluster
from latchkey_service.postgres import embedded_host
from latchkey_service.settings.data_dir import default_data_dir

options = json.loads(sys.argv[1])
codecs.lookup("ascii")  # Loaded while the interpreter's own files are within reach.
if options.get("uid"):
    os.setgroups([])
    os.setgid(options["gid"])
    os.setuid(options["uid"])
if options.get("untied"):
    embedded_host._tie_to_parent = lambda death_signal: None
data_dir = Path(options["data_dir"]) if "data_dir" in options else default_data_dir()
server = embedded_cluster.EmbeddedPostgres(data_dir)
try:
    said = {"dsn": server.start(), "pid": server.pid, "data_dir": str(data_dir)}
except embedded_cluster.EmbeddedError as error:
    said = {"error": type(error).__name__, "message": str(error)}
if options.get("forks"):
    runs, tells = os.pipe()
    said["worker_pid"] = os.fork()
    if said["worker_pid"] == 0:
        os.write(tells, b".")
        sys.stdin.read()
        os._exit(0)
    os.read(runs, 1)  # What is done after a fork, in the child, is done.
print(json.dumps(said), flush=True)
sys.stdin.read()
server.stop()
"""


@contextlib.contextmanager
def child(**options: Any) -> Iterator[subprocess.Popen[str]]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("XDG_")
    } | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment | options.get("env", {}),
    )
    with process:
        try:
            yield process
        finally:
            if process.stdin:
                process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(WAIT_SECONDS)
            process.kill()


def said(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    return answer


def query(dsn: str, sql: str, **connect: Any) -> Any:
    """Run `sql`; return the first value, if it is a SELECT or SHOW."""

    async def run() -> Any:
        connection = await asyncpg.connect(dsn, timeout=WAIT_SECONDS, **connect)
        try:
            if sql.startswith(("SELECT", "SHOW")):
                return await connection.fetchval(sql)
            return await connection.execute(sql)
        finally:
            await connection.close()

    # With a factory, the runner does not touch the event loop of the session.
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        return runner.run(run())


def rows(dsn: str) -> Any:
    return query(dsn, "SELECT string_agg(word, ',') FROM kept")


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.005)


def is_gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def socket_dir(dsn: str) -> Path:
    return Path(parse_qs(urlsplit(dsn).query)["host"][0])


def needs_root() -> None:
    if not IS_ROOT:
        pytest.skip("only root runs PostgreSQL under another account")
