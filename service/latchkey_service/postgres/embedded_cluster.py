"""A private PostgreSQL for a Latchkey without a configured database.

Owns the cluster's whole life: its directory, account, password, socket, start, crash and end.
It does not own the schema, the pool, or the decision to use an embedded database.

Everything here is synchronous and must run on the main thread of the supervisor: Linux ends the
postmaster when the thread that started it ends. The first call must precede any other thread,
because it forks. A restart may happen beside other threads; the child makes only two system calls.

Contents of the data directory::

    lock               locked with flock as long as this process uses the directory
    postgres/          the cluster, 0700, owned by the account PostgreSQL runs as
    postgres.password  password of the role `latchkey`, 0600
    postgres.log       log of the server and of initdb
    run/               directory of the socket, 0700
    bin-VERSION/       a copy of the programs, only if the account cannot reach root's
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Final
from urllib.parse import quote

from latchkey_service.postgres.embedded_host import (
    PORT,
    DataDirInUse,
    EmbeddedError,
    OsAccount,
    choose_account,
    hold_signals,
    is_postmaster,
    make_data_dir,
    make_socket_dir,
    reachable_programs,
    require_reach,
    socket_dir_path,
    spawn,
)

__all__ = ["DataDirInUse", "EmbeddedError", "EmbeddedPostgres"]

_POSTGRES_MAJOR: Final = "18"

# Fast shutdown writes a checkpoint: up to 512 MB of dirty buffers to a slow disk.
_FAST_SHUTDOWN_SECONDS: Final = 20.0
# On SIGQUIT, the postmaster kills its children after 5 s.
_IMMEDIATE_SHUTDOWN_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.02
_LOG_BYTES_MAX: Final = 10 * 1024 * 1024
_LOG_TAIL_BYTES: Final = 8192
_LOG_TAIL_LINES: Final = 12

# Written into postgresql.conf once; the operator may change them there. fsync, synchronous_commit
# and full_page_writes keep their default, on, so an acknowledged deletion survives a power cut.
# shared_buffers is allocated on demand. A million tokens fill half of it; with the default, 128MB,
# each look-up among them took twice the CPU.
_SETTINGS: Final = {"max_connections": "200", "shared_buffers": "512MB"}


class EmbeddedPostgres:
    """One PostgreSQL cluster and its postmaster, a child of this process."""

    def __init__(self, data_dir: Path) -> None:
        # Resolved, because this exact path identifies the leftover postmaster of an earlier run.
        self.data_dir: Final = data_dir.expanduser().resolve()
        self._cluster: Final = self.data_dir / "postgres"
        self._password_file: Final = self.data_dir / "postgres.password"
        self._log: Final = self.data_dir / "postgres.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._exit_code: int | None = None
        self._lock_fd: int | None = None
        self._owner_pid = os.getpid()

    @property
    def pid(self) -> int | None:
        """The postmaster's process id, or None if it was not started."""
        return None if self._process is None else self._process.pid

    def start(self, timeout_seconds: float = 60.0) -> str:
        """Start the server and return its DSN. Create the cluster first if there is none.

        The DSN works with asyncpg and libpq. The time limit includes crash recovery. If the server
        is already running, only returns the DSN. Raises DataDirInUse or EmbeddedError; afterwards,
        nothing is running or locked, and poll() returns the same exit code as before the restart.
        """
        deadline = time.monotonic() + timeout_seconds
        exit_code = self.poll()
        try:
            dsn = self._start(deadline)
        except BaseException as error:  # Ctrl-C too: a half-started server would hold the data.
            self.stop()
            self._exit_code = exit_code
            if isinstance(error, OSError):
                raise EmbeddedError(
                    f"cannot use {self.data_dir} for the embedded PostgreSQL ({error}); "
                    "give this user access to it or set LATCHKEY_DATA_DIR to another directory"
                ) from error
            raise
        return dsn

    def poll(self) -> int | None:
        """Return the exit code of a postmaster that exited and awaits start(), or None."""
        return self._exit_code if self._process is None else self._process.poll()

    def stop(self) -> None:
        """Shut the server down and release the data directory. Takes at most 40 s; idempotent.

        First a fast shutdown (disconnects clients, writes a checkpoint), then an immediate one (the
        next start recovers from the log). Does nothing in a forked copy of the process.
        """
        if os.getpid() != self._owner_pid:
            return
        if self._process is not None:
            for signal_number, bound_seconds in (
                (signal.SIGINT, _FAST_SHUTDOWN_SECONDS),
                (signal.SIGQUIT, _IMMEDIATE_SHUTDOWN_SECONDS),
                (signal.SIGKILL, _IMMEDIATE_SHUTDOWN_SECONDS),
            ):
                self._process.send_signal(signal_number)  # Ignored if it has ended.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(bound_seconds)
                    break
            self._process = None
        self._exit_code = None
        if self._lock_fd is not None:
            _lock_fds.discard(self._lock_fd)
            os.close(self._lock_fd)
            self._lock_fd = None

    def _start(self, deadline: float) -> str:
        if self._process is None or self._process.poll() is not None:
            self._process = None
            make_data_dir(self.data_dir)
            self._lock()
            account = choose_account(self._cluster)
            require_reach(self.data_dir, account)
            programs = reachable_programs(self.data_dir, account)
            self._rotate_log()
            stale_pid = self._end_left_over(deadline)
            if not self._has_cluster():
                self._make_cluster(programs, account, deadline)
            self._launch(programs, account, deadline, stale_pid)
        return self.dsn()

    def dsn(self) -> str:
        """Return the DSN of the existing cluster. Raises EmbeddedError."""
        try:
            password = self._password_file.read_text("ascii").strip()
        except FileNotFoundError:
            raise EmbeddedError(
                f"{self._password_file} is missing; restore it, or move {self._cluster} away to "
                "start with an empty database"
            ) from None
        # Names the port, because PGPORT in the client's environment would change it.
        host = quote(str(socket_dir_path(self.data_dir)), safe="/")
        return f"postgresql://latchkey:{password}@/latchkey?host={host}&port={PORT}"

    def _lock(self) -> None:
        if self._lock_fd is not None:
            return
        fd = _open_private(self.data_dir / "lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            raise DataDirInUse(
                f"another Latchkey (pid {holder}) is using {self.data_dir}; "
                "stop it or set LATCHKEY_DATA_DIR"
            ) from None
        self._lock_fd, self._owner_pid = fd, os.getpid()
        _lock_fds.add(fd)
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % self._owner_pid, 0)

    def _has_cluster(self) -> bool:
        try:
            major = (self._cluster / "PG_VERSION").read_text("ascii").strip()
        except FileNotFoundError:
            return False  # If the directory contains anything else, the later rename fails.
        if major != _POSTGRES_MAJOR:
            raise EmbeddedError(
                f"{self._cluster} was written by PostgreSQL {major}, but this Latchkey contains "
                f"{_POSTGRES_MAJOR}; transfer the data with pg_dump of version {major}, or set "
                "LATCHKEY_DATA_DIR to a new directory"
            )
        return True

    def _make_cluster(self, programs: Path, account: "OsAccount", deadline: float) -> None:
        """Create the cluster, role and database in a work directory, then move it into place."""
        for remains in self.data_dir.glob("init-*"):
            shutil.rmtree(remains, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix="init-", dir=self.data_dir))
        cluster, superuser_password, password = work / "cluster", work / "pw", _new_password()
        # Nobody keeps the superuser's password. The service's role has no superuser rights, so a
        # vulnerability in the service cannot run programs. CREATEDB lets tests clone databases.
        sql = (
            f"CREATE ROLE latchkey LOGIN CREATEDB PASSWORD '{password}';\n"
            "CREATE DATABASE latchkey OWNER latchkey;\n"
        )
        initdb = [
            *(f"{programs}/initdb", f"--pgdata={cluster}", "--username=postgres"),
            *(f"--pwfile={superuser_password}", "--data-checksums", "--no-instructions"),
            *("--auth-local=scram-sha-256", "--auth-host=scram-sha-256", "--encoding=UTF8"),
            *("--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
            *(f"--set={name}={value}" for name, value in _SETTINGS.items()),
        ]
        single_user = [
            *(f"{programs}/postgres", "--single", "-D", str(cluster)),
            # Without the first, a failed command does not affect the exit code. The second keeps
            # the password out of the log.
            *("-c", "exit_on_error=true", "-c", "log_min_error_statement=panic", "postgres"),
        ]
        try:
            _write_private(superuser_password, _new_password())
            # The file first: once the account owns the directory, a name in it may be a symlink.
            os.chown(superuser_password, account.uid, account.gid)
            os.chown(work, account.uid, account.gid)
            self._run(initdb, account, deadline)
            self._run(single_user, account, deadline, sql.encode("ascii"))
            # The password before the cluster: a crash in between leaves a password without a
            # cluster, which the next start replaces, and not a cluster without a known password.
            _write_private(self._password_file, password)
            cluster.rename(self._cluster)
            fd = os.open(self.data_dir, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(fd)
            os.close(fd)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _launch(
        self, programs: Path, account: "OsAccount", deadline: float, stale_pid: int | None
    ) -> None:
        """Start the postmaster and return once it accepts connections."""
        socket_dir = make_socket_dir(self.data_dir, account)
        # Stale like postmaster.pid: its postmaster is known to be gone.
        (socket_dir / f".s.PGSQL.{PORT}.lock").unlink(missing_ok=True)
        quoted_dir = str(socket_dir).replace('"', '""')
        argv = [
            *(f"{programs}/postgres", "-D", str(self._cluster), "-p", PORT),
            # On the command line, which overrides the file: access must not be configurable.
            *("-c", "listen_addresses=", "-c", f'unix_socket_directories="{quoted_dir}"'),
            *("-c", "unix_socket_permissions=0700"),
        ]
        # PostgreSQL refuses to start while the pid in a stale postmaster.pid is alive. Here it
        # belongs to another program. With this variable of pg_ctl, PostgreSQL ignores that pid.
        # Deleting the file would lose its other purpose, the check for surviving backends.
        extra = {} if stale_pid is None else {"PG_GRANDPARENT_PID": str(stale_pid)}
        while True:
            stale_status = self._read_status()
            with self._open_log() as log:
                log_offset = log.tell()
                with hold_signals():
                    self._process = spawn(argv, account, log, signal.SIGINT, extra)
            while self._process.poll() is None:
                status = self._read_status()
                # Compare with the stale file: in a container, the new postmaster may get the same
                # pid as the one that was killed.
                if status != stale_status and _is_ready(status, self._process.pid):
                    return
                if time.monotonic() > deadline:
                    raise EmbeddedError(
                        "the embedded PostgreSQL was not ready in time; recovery after a crash may "
                        f"take longer. Its log ends with:\n{self._log_tail(log_offset)}"
                    )
                time.sleep(_POLL_SECONDS)
            tail = self._log_tail(log_offset)
            # Backends of a killed postmaster need a moment to detect that.
            if "pre-existing shared memory block" not in tail or time.monotonic() > deadline:
                raise EmbeddedError(
                    f"the embedded PostgreSQL did not start (exit code {self._process.returncode});"
                    f" {self._log} ends with:\n{tail}"
                )
            time.sleep(_POLL_SECONDS)

    def _end_left_over(self, deadline: float) -> int | None:
        """End the postmaster of an earlier run. Return the pid of a stale file, if any.

        We hold the lock, so no other Latchkey owns that postmaster: its parent died. It cannot be
        reused, because we could not monitor a process that is not our child, and it would outlive
        us.
        """
        first_line = "".join(self._read_status()[:1]).strip()
        if not first_line.isdigit() or int(first_line) == 0:
            return None
        pid = int(first_line)
        fast_until = time.monotonic() + _FAST_SHUTDOWN_SECONDS
        sent: signal.Signals | None = None
        while is_postmaster(pid, self._cluster):
            now = time.monotonic()
            wanted = signal.SIGINT if now < fast_until else signal.SIGQUIT
            if wanted is not sent:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, wanted)
                sent = wanted
            if now > min(deadline, fast_until + _IMMEDIATE_SHUTDOWN_SECONDS):
                raise EmbeddedError(
                    f"the PostgreSQL (pid {pid}) of an earlier run still uses {self._cluster} and "
                    "does not exit; kill that process and start again"
                )
            time.sleep(_POLL_SECONDS)
        return pid

    def _run(
        self, argv: Sequence[str], account: "OsAccount", deadline: float, stdin: bytes = b""
    ) -> None:
        with contextlib.ExitStack() as stack:
            with self._open_log() as log, hold_signals():
                log_offset = log.tell()
                process = spawn(argv, account, log, signal.SIGKILL, {}, subprocess.PIPE)
                # First killed, which does nothing to one that has ended, and then waited for.
                stack.enter_context(process)
                stack.callback(process.kill)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(stdin, max(0.0, deadline - time.monotonic()))
        if process.returncode != 0:  # -9: the time ran out.
            raise EmbeddedError(
                f"{argv[0]} could not create the database (exit code {process.returncode}); "
                f"{self._log} ends with:\n{self._log_tail(log_offset)}"
            )

    def _read_status(self) -> list[str]:
        """Return the lines of postmaster.pid (pid first, status eighth), or [] without a file."""
        try:
            return (self._cluster / "postmaster.pid").read_text("utf-8", "replace").splitlines()
        except FileNotFoundError:
            return []

    def _rotate_log(self) -> None:
        if self._log.exists() and self._log.stat().st_size > _LOG_BYTES_MAX:
            self._log.replace(f"{self._log}.1")

    def _open_log(self) -> BinaryIO:
        return open(self._log, "ab", opener=_open_private)

    def _log_tail(self, offset: int) -> str:
        text = self._log.read_bytes()[offset:][-_LOG_TAIL_BYTES:].decode("utf-8", "replace")
        return "\n".join(f"  {line}" for line in text.splitlines()[-_LOG_TAIL_LINES:])


# A forked child shares the open file and thus the flock: a worker that outlives its parent would
# keep the directory locked. O_CLOEXEC helps only in processes that exec.
_lock_fds: set[int] = set()


def _close_lock_fds() -> None:
    while _lock_fds:
        os.close(_lock_fds.pop())


os.register_at_fork(after_in_child=_close_lock_fds)


def _is_ready(status: Sequence[str], pid: int) -> bool:
    return len(status) >= 8 and status[0] == str(pid) and status[7].strip() == "ready"


def _new_password() -> str:
    return secrets.token_urlsafe(32)


def _write_private(path: Path, text: str) -> None:
    with open(path, "w", encoding="ascii", opener=_open_private) as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def _open_private(path: str | Path, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)
