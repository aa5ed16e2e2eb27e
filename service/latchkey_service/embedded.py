"""A private PostgreSQL for a Latchkey that was given no database.

Owns the cluster's whole life: its directory, account, password, socket, start, crash and end.
It does not own the schema, the pool, or the decision to use an embedded database at all.

Everything here is synchronous and meant for the main thread of the supervising process: Linux
ends the postmaster when the thread that started it ends. It is first called before any other
thread exists, as it forks; at a restart there may be some, and the child makes two system calls.

What lies in the data directory::

    lock               held with flock for as long as this process uses the directory
    postgres/          the cluster, 0700, owned by the account PostgreSQL runs as
    postgres.password  of the role `latchkey`, 0600
    postgres.log       of the server, and of making the cluster
    run/               the directory of the socket, 0700
    bin-VERSION/       a copy of the programs, only where root's are out of the account's reach
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

from latchkey_service.embedded_host import (
    PORT,
    Account,
    DataDirInUse,
    EmbeddedError,
    choose_account,
    default_data_dir,
    is_postmaster,
    make_data_dir,
    make_socket_dir,
    reachable_programs,
    require_reach,
    socket_dir_path,
    spawn,
)

__all__ = ["DataDirInUse", "EmbeddedError", "EmbeddedPostgres", "default_data_dir"]

_POSTGRES_MAJOR: Final = "18"

# Fast shutdown writes a checkpoint: up to 512 MB of dirty buffers to a slow disk.
_FAST_SHUTDOWN_SECONDS: Final = 20.0
# On SIGQUIT the postmaster itself kills its children after 5 s.
_IMMEDIATE_SHUTDOWN_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.02
_LOG_BYTES_MAX: Final = 10 * 1024 * 1024
_LOG_TAIL_BYTES: Final = 8192
_LOG_TAIL_LINES: Final = 12

# Written into postgresql.conf once, where the operator may change them. fsync, synchronous_commit
# and full_page_writes keep their defaults, on: an acknowledged deletion survives a power cut.
# shared_buffers is taken as data comes; a million tokens fill half of it, and with 128MB, the
# default, each look-up among them took twice the CPU.
_SETTINGS: Final = {"max_connections": "200", "shared_buffers": "512MB"}


class EmbeddedPostgres:
    """One PostgreSQL cluster and its postmaster, a child of this process."""

    def __init__(self, data_dir: Path) -> None:
        # Resolved, since the left-over postmaster of an earlier run is known by this very path.
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
        """The postmaster's process id, or None when it was not started."""
        return None if self._process is None else self._process.pid

    def start(self, timeout_seconds: float = 60.0) -> str:
        """Start the server and return its DSN, making the cluster first where there is none.

        The DSN suits asyncpg and libpq. The bound covers crash recovery. Does nothing but return
        the DSN when the server runs. Raises DataDirInUse, EmbeddedError; neither leaves anything
        running or locked, and poll() goes on telling of the end that a failed restart was for.
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
        """Return the exit code of a postmaster that ended by itself and awaits start(), or None."""
        return self._exit_code if self._process is None else self._process.poll()

    def stop(self) -> None:
        """Shut the server down and release the data directory; at most 40 s, idempotent.

        Fast at first (clients are cut off, data is checkpointed), then immediate (the next start
        recovers from the log). Does nothing in a forked copy of the process.
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
        """Return the DSN of the cluster that was made there. Raises EmbeddedError."""
        try:
            password = self._password_file.read_text("ascii").strip()
        except FileNotFoundError:
            raise EmbeddedError(
                f"{self._password_file} is missing; restore it, or move {self._cluster} away to "
                "start with an empty database"
            ) from None
        # The port is named as PGPORT in the client's environment would change it otherwise.
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
            return False  # A directory that holds anything else makes the rename fail, untouched.
        if major != _POSTGRES_MAJOR:
            raise EmbeddedError(
                f"{self._cluster} was written by PostgreSQL {major}, this Latchkey brings "
                f"{_POSTGRES_MAJOR}; carry the data over with pg_dump of version {major}, or set "
                "LATCHKEY_DATA_DIR to a new directory"
            )
        return True

    def _make_cluster(self, programs: Path, account: "Account", deadline: float) -> None:
        """Make the cluster, role and database aside, then move them into place in one step."""
        for remains in self.data_dir.glob("init-*"):
            shutil.rmtree(remains, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix="init-", dir=self.data_dir))
        cluster, superuser_password, password = work / "cluster", work / "pw", _new_password()
        # The superuser's password is thrown away. The service's role is an ordinary one, so that
        # a hole in the service is no way to run programs. CREATEDB lets tests clone databases.
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
            # Without the first, a failed command does not show in the exit code. The second
            # keeps the password out of the log.
            *("-c", "exit_on_error=true", "-c", "log_min_error_statement=panic", "postgres"),
        ]
        try:
            _write_private(superuser_password, _new_password())
            # The file first: once the directory is the account's, a name in it may be a trap.
            os.chown(superuser_password, account.uid, account.gid)
            os.chown(work, account.uid, account.gid)
            self._run(initdb, account, deadline)
            self._run(single_user, account, deadline, sql.encode("ascii"))
            # The password before the cluster: a crash in between leaves a password without a
            # cluster, which the next start replaces, not a cluster that nobody can enter.
            _write_private(self._password_file, password)
            cluster.rename(self._cluster)
            fd = os.open(self.data_dir, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(fd)
            os.close(fd)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _launch(
        self, programs: Path, account: "Account", deadline: float, stale_pid: int | None
    ) -> None:
        """Start the postmaster and return when it accepts connections."""
        socket_dir = make_socket_dir(self.data_dir, account)
        # As stale as postmaster.pid, whose postmaster is known to be gone by now.
        (socket_dir / f".s.PGSQL.{PORT}.lock").unlink(missing_ok=True)
        quoted_dir = str(socket_dir).replace('"', '""')
        argv = [
            *(f"{programs}/postgres", "-D", str(self._cluster), "-p", PORT),
            # On the command line, where they overrule the file: who can connect is not a setting.
            *("-c", "listen_addresses=", "-c", f'unix_socket_directories="{quoted_dir}"'),
            *("-c", "unix_socket_permissions=0700"),
        ]
        # PostgreSQL refuses to start while the pid in a stale postmaster.pid is alive. That pid
        # was found to be something else, and this variable, pg_ctl's, tells it to look past it.
        # Removing the file would lose the check for surviving backends that it also serves.
        extra = {} if stale_pid is None else {"PG_GRANDPARENT_PID": str(stale_pid)}
        while True:
            stale_status = self._read_status()
            with self._open_log() as log:
                log_offset = log.tell()
                self._process = spawn(argv, account, log, signal.SIGINT, extra)
            while self._process.poll() is None:
                status = self._read_status()
                # The comparison with the stale file matters in containers, where the new
                # postmaster may well get the pid of the one that was killed.
                if status != stale_status and _is_ready(status, self._process.pid):
                    return
                if time.monotonic() > deadline:
                    raise EmbeddedError(
                        "the embedded PostgreSQL was not ready in time; after a crash it may need "
                        f"longer to recover. Its log ends:\n{self._log_tail(log_offset)}"
                    )
                time.sleep(_POLL_SECONDS)
            tail = self._log_tail(log_offset)
            # Backends of a killed postmaster take a moment to notice.
            if "pre-existing shared memory block" not in tail or time.monotonic() > deadline:
                raise EmbeddedError(
                    f"the embedded PostgreSQL did not start (exit code {self._process.returncode});"
                    f" the end of {self._log} tells why:\n{tail}"
                )
            time.sleep(_POLL_SECONDS)

    def _end_left_over(self, deadline: float) -> int | None:
        """End the postmaster of an earlier run; return the pid of a stale file, if any.

        With the lock held no other Latchkey owns it, so it lost its parent. It is ended and not
        adopted: one that is not a child could not be watched, and would outlive this process.
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
                    f"the PostgreSQL (pid {pid}) of an earlier run still holds {self._cluster} and "
                    "does not end; end that process and start again"
                )
            time.sleep(_POLL_SECONDS)
        return pid

    def _run(
        self, argv: Sequence[str], account: "Account", deadline: float, stdin: bytes = b""
    ) -> None:
        with self._open_log() as log:
            log_offset = log.tell()
            process = spawn(argv, account, log, signal.SIGKILL, {}, subprocess.PIPE)
        with process:
            try:
                process.communicate(stdin, max(0.0, deadline - time.monotonic()))
            except BaseException as error:
                process.kill()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
        if process.returncode != 0:  # -9: it took too long.
            raise EmbeddedError(
                f"{argv[0]} could not make the database (exit code {process.returncode}); the end "
                f"of {self._log} tells why:\n{self._log_tail(log_offset)}"
            )

    def _read_status(self) -> list[str]:
        """Return the lines of postmaster.pid: pid, ..., status in the eighth. Empty if none."""
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


# flock belongs to the open file, which a forked child shares: a worker that outlives its parent
# would keep the directory locked. O_CLOEXEC helps only those that exec.
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
