"""The embedded PostgreSQL: real clusters, real crashes, as root and as an ordinary user."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import psutil
import pytest
from latchkey_service.postgres.embedded_cluster import (
    DataDirInUse,
    EmbeddedError,
    EmbeddedPostgres,
)

from tests.helpers.scratch import SCRATCH
from tests.integration.postgres.embedded_process import (
    IS_ROOT,
    WAIT_SECONDS,
    child,
    is_gone,
    mode,
    query,
    rows,
    said,
    socket_dir,
    wait_until,
)

pytestmark = [
    # The tests share one cluster and take turns to stop it.
    pytest.mark.xdist_group("embedded"),
    # The service starts the server before any thread; a test runner may have threads.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def root_dir() -> Iterator[Path]:
    # pytest's tmp_path is 0700, closed to the account that root gives PostgreSQL.
    path = Path(tempfile.mkdtemp(prefix="latchkey-test-", dir=SCRATCH))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def shared(root_dir: Path) -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres(root_dir / "shared")
    yield server
    server.stop()


@pytest.fixture
def server(shared: EmbeddedPostgres) -> EmbeddedPostgres:
    """Run the shared server, with one row in its table `kept`."""
    query(
        shared.start(),
        "CREATE TABLE IF NOT EXISTS kept (word text);"
        "TRUNCATE kept; INSERT INTO kept VALUES ('committed')",
    )
    return shared


def test_first_start_creates_a_durable_private_database(server: EmbeddedPostgres) -> None:
    """The first start creates a UTF-8 database with checksums and fsync, and a role that is not a
    superuser."""
    dsn = server.start()
    assert query(dsn, "SELECT current_database()") == "latchkey"
    for setting, value in {
        "server_encoding": "UTF8",
        "data_checksums": "on",
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        "max_connections": "200",
        "is_superuser": "off",
        "listen_addresses": "",
    }.items():
        assert query(dsn, f"SHOW {setting}") == value, setting


def test_data_survives_a_restart_and_stop_is_idempotent(server: EmbeddedPostgres) -> None:
    """Committed data survives stop, stop, start, and the DSN stays the same."""
    dsn, pid = server.start(), server.pid
    server.stop()
    server.stop()
    assert server.pid is None
    assert server.poll() is None
    assert pid is not None
    assert is_gone(pid)
    assert server.start() == dsn
    assert rows(dsn) == "committed"


def test_start_of_a_running_server_changes_nothing(server: EmbeddedPostgres) -> None:
    """A second start returns the same DSN and leaves the postmaster alone."""
    dsn, pid = server.start(), server.pid
    assert server.start() == dsn
    assert server.pid == pid


def test_files_are_closed_to_others(server: EmbeddedPostgres) -> None:
    """Other users cannot read the socket, the data or the password; root's data directory stays
    root's."""
    dsn, data_dir = server.start(), server.data_dir
    assert socket_dir(dsn) == data_dir / "run"
    assert mode(data_dir / "run") == 0o700
    assert mode(data_dir / "postgres") == 0o700
    for name in ("postgres.password", "postgres.log", "lock"):
        assert mode(data_dir / name) == 0o600, name
        assert (data_dir / name).stat().st_uid == os.geteuid(), name
    assert mode(data_dir) == (0o755 if IS_ROOT else 0o700)
    assert data_dir.stat().st_uid == os.geteuid()
    assert psutil.Process(server.pid).uids().real != 0
    assert psutil.Process(server.pid).uids().real == (data_dir / "postgres").stat().st_uid


def test_the_password_is_required(server: EmbeddedPostgres) -> None:
    """A wrong password is rejected, for the superuser too: no connection is trusted."""
    dsn = server.start()
    for user in ("latchkey", "postgres"):
        for password in ("wrong", urlsplit(dsn).password if user == "postgres" else "none"):
            with pytest.raises(asyncpg.InvalidPasswordError):
                query(dsn, "SELECT 1", user=user, password=password)


def test_secrets_stay_out_of_log_and_environment(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL sees neither the service's secrets nor PG* variables; its log contains no
    password."""
    server.stop()
    monkeypatch.setenv("LATCHKEY_CANARY", "canary-secret")
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGDATA", "/nowhere")
    dsn = server.start()
    assert rows(dsn) == "committed"  # PGPORT does not mislead the client either.
    environment = psutil.Process(server.pid).environ()
    assert not [name for name in environment if name.startswith(("PG", "LATCHKEY"))]
    password = urlsplit(dsn).password
    assert password
    assert password not in (server.data_dir / "postgres.log").read_text()


def test_ctrl_c_in_the_terminal_does_not_reach_it(server: EmbeddedPostgres) -> None:
    """The postmaster leads its own session, so Ctrl-C in the terminal does not reach it."""
    assert server.pid is not None
    assert os.getsid(server.pid) == server.pid


def test_second_process_on_the_same_data_is_rejected(server: EmbeddedPostgres) -> None:
    """A second process fails with a message that names the first one and what to do, and causes no
    damage."""
    with child(data_dir=str(server.data_dir)) as process:
        answer = said(process)
    assert answer["error"] == "DataDirInUse"
    assert answer["message"] == (
        f"another Latchkey (pid {os.getpid()}) is using {server.data_dir}; "
        "stop it or set LATCHKEY_DATA_DIR"
    )
    with pytest.raises(DataDirInUse):
        EmbeddedPostgres(server.data_dir).start()
    assert rows(server.start()) == "committed"


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_kill_9_of_the_owner(server: EmbeddedPostgres, *, untied: bool) -> None:
    """After kill -9 of its owner, the server exits or the next start ends it, and the data is
    intact.

    A forked worker that outlives the owner does not keep the directory locked.
    """
    server.stop()
    with child(data_dir=str(server.data_dir), untied=untied, forks=True) as process:
        answer = said(process)
        query(answer["dsn"], "INSERT INTO kept VALUES ('by the child')")
        process.kill()
        process.wait(WAIT_SECONDS)
        if untied or sys.platform != "linux":
            assert not is_gone(answer["pid"])
        else:
            wait_until(lambda: is_gone(answer["pid"]), "the postmaster ends with its owner")
        assert not is_gone(answer["worker_pid"])
        try:
            dsn = server.start()
            assert is_gone(answer["pid"])
            assert rows(dsn) == "committed,by the child"
        finally:
            if not is_gone(answer["pid"]):  # Only when the test fails.
                os.kill(answer["pid"], signal.SIGQUIT)


def test_kill_9_of_the_postmaster(server: EmbeddedPostgres) -> None:
    """poll() reports that the postmaster was killed; start() restores the server with its data."""
    dsn, pid = server.start(), server.pid
    assert pid is not None
    assert server.poll() is None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: server.poll() is not None, "poll() reports the exit")
    assert server.poll() == -signal.SIGKILL
    assert server.start() == dsn
    assert server.pid != pid
    assert rows(dsn) == "committed"


def test_stale_pid_file_that_names_an_innocent_process(server: EmbeddedPostgres) -> None:
    """A stale postmaster.pid with a reused pid neither blocks the start nor harms that process."""
    cluster = server.data_dir / "postgres"
    owner = cluster.stat()
    lines = (cluster / "postmaster.pid").read_text().splitlines()
    server.stop()
    as_owner: dict[str, Any] = (
        {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []} if IS_ROOT else {}
    )
    # Same account: otherwise PostgreSQL would notice that it is not a postmaster.
    with (
        subprocess.Popen(["sleep", "600"], **as_owner) as innocent,
        subprocess.Popen(["sleep", "600"], **as_owner) as also_innocent,
    ):
        try:
            for stale, pid in (
                (cluster / "postmaster.pid", innocent.pid),
                (server.data_dir / "run" / ".s.PGSQL.5432.lock", also_innocent.pid),
            ):
                stale.write_text("\n".join([str(pid), *lines[1:]]) + "\n")
                stale.chmod(0o600)
                os.chown(stale, owner.st_uid, owner.st_gid)
            assert rows(server.start()) == "committed"
            assert innocent.poll() is None
            assert also_innocent.poll() is None
        finally:
            innocent.kill()
            also_innocent.kill()


def test_interrupted_creation_of_the_cluster(root_dir: Path) -> None:
    """After kill -9 in the middle of initdb, the next start begins again and removes leftovers."""
    data_dir = root_dir / "interrupted"
    with child(data_dir=str(data_dir)) as process:
        wait_until(lambda: [*data_dir.glob("init-*/cluster/global")], "initdb is running")
        process.kill()
        process.wait(WAIT_SECONDS)
    assert not (data_dir / "postgres").exists()
    # The state after a crash between writing the password and moving the cluster.
    (data_dir / "postgres.password").write_text("of a cluster that never was\n")
    server = EmbeddedPostgres(data_dir)
    try:
        assert query(server.start(), "SELECT 1") == 1
    finally:
        server.stop()
    assert not [*data_dir.glob("init-*")]


def test_path_too_long_for_a_socket(root_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long path with a space and a comma gets a private socket directory elsewhere.

    A symlink that another user may have created in its place is rejected.
    """
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    server = EmbeddedPostgres(root_dir / f"a path, {'long' * 30}")
    dsn = server.start()
    try:
        elsewhere = socket_dir(dsn)
        assert not elsewhere.is_relative_to(root_dir)
        assert mode(elsewhere) == 0o700
        assert elsewhere.stat().st_uid == (server.data_dir / "postgres").stat().st_uid
        assert query(dsn, "SELECT 1") == 1
    finally:
        server.stop()
    shutil.rmtree(elsewhere)
    trap = root_dir / "trap"
    trap.mkdir()
    elsewhere.symlink_to(trap)
    try:
        with pytest.raises(EmbeddedError, match=str(elsewhere)):
            server.start()
    finally:
        elsewhere.unlink()
    assert not [*trap.iterdir()]


def test_start_failure_quotes_the_log(server: EmbeddedPostgres) -> None:
    """The error of a failed restart contains the reason. poll() still asks for a restart, and the
    next one works."""
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: server.poll() is not None, "poll() reports the exit")
    config = server.data_dir / "postgres" / "postgresql.conf"
    text = config.read_text()
    config.write_text(text + "\nno_such_setting = 1\n")
    try:
        with pytest.raises(EmbeddedError, match=r'unrecognized configuration.*"no_such_setting"'):
            server.start()
    finally:
        config.write_text(text)
    assert server.pid is None
    assert server.poll() == -signal.SIGKILL
    assert rows(server.start()) == "committed"
    assert server.poll() is None


def test_data_of_another_version_is_left_alone(server: EmbeddedPostgres) -> None:
    """Data of another major version is reported and not touched."""
    server.stop()
    version = server.data_dir / "postgres" / "PG_VERSION"
    version.write_text("17\n")
    try:
        with pytest.raises(EmbeddedError, match=r"PostgreSQL 17, .*pg_dump"):
            server.start()
    finally:
        version.write_text("18\n")
    assert rows(server.start()) == "committed"


def test_lost_password_file_is_named(server: EmbeddedPostgres) -> None:
    """A cluster without its password file is not replaced; the error says what to restore."""
    server.stop()
    password = server.data_dir / "postgres.password"
    aside = password.rename(server.data_dir / "aside")
    try:
        with pytest.raises(EmbeddedError, match=r"postgres\.password is missing"):
            server.start()
    finally:
        aside.rename(password)
    assert rows(server.start()) == "committed"


def test_log_is_bounded(server: EmbeddedPostgres) -> None:
    """A log that exceeds its bound is renamed at the next start."""
    server.stop()
    log = server.data_dir / "postgres.log"
    os.truncate(log, 11 * 1024 * 1024)
    server.start()
    assert log.stat().st_size < 1024 * 1024
    assert (server.data_dir / "postgres.log.1").stat().st_size == 11 * 1024 * 1024


def test_missing_binaries_are_explained(root_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the optional dependency, the error names both remedies."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EmbeddedError, match=r"embedded\]', or set LATCHKEY_DATABASE_URL"):
        EmbeddedPostgres(root_dir / "uninstalled").start()
