"""The privileges of a process of the service, and its protection from debuggers.

The supervisor and the workers hold keys and secrets in memory, so they write no core dumps, and
processes of the same user cannot read their memory (Linux).

If the service was started as root, its workers drop root once they listen. The supervisor stays
root, so that it can restart Postgres and workers. It serves no calls. A worker drops root itself,
because Linux lets only processes of one user share a port.
"""

import contextlib
import ctypes
import os
import pwd
import resource
import sys
from pathlib import Path
from typing import Final

import grpc

import latchkey_service
from latchkey_service.postgres.embedded_host import (
    EmbeddedError,
    OsAccount,
    choose_account,
    default_account,
    why_unreadable,
)
from latchkey_service.settings.logs import logger
from latchkey_service.settings.settings import Settings

__all__ = ["ACCOUNT_VARIABLE", "account_of_workers", "forbid_dumps", "give_up_root", "home_of"]

# In a worker's environment: the user and group to become, such as "998:998".
ACCOUNT_VARIABLE: Final = "LATCHKEY_WORKER_ACCOUNT"
_PR_SET_DUMPABLE: Final = 4  # linux/prctl.h


def forbid_dumps(settings: Settings) -> None:
    """Prevent core dumps, and access by debuggers of the same user, unless the settings allow
    it.
    """
    if settings.core_dumps == "on":
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # This prevents dumps that the kernel passes to a program, too. The limit does not.
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE) failed")


def account_of_workers(settings: Settings) -> OsAccount | None:
    """Return the account for the workers, or None if they keep ours. If they stay root, log the
    reason.

    With the embedded Postgres, that is Postgres' account, because no other may connect.
    Otherwise it is the owner of the data directory, unless that is root.
    """
    if os.geteuid() != 0 or settings.drop_root == "off":
        return None
    try:
        owned = settings.data_dir if settings.database_url else settings.data_dir / "postgres"
        is_roots = settings.database_url is not None and _belongs_to_root(owned)
        account = default_account() if is_roots else choose_account(owned)
    except EmbeddedError as error:
        _stays_root(str(error))
        return None
    # Python imports modules later, too.
    needed = [Path(os.__file__), Path(grpc.__file__), Path(latchkey_service.__file__)]
    if (reason := why_unreadable(needed, account)) is not None:
        _stays_root(f"uid {account.uid} cannot read the programs: {reason}")
        return None
    files = [settings.tls_certificate, settings.tls_key, settings.tls_client_ca]
    reason = why_unreadable([path.absolute() for path in files if path is not None], account)
    if reason is not None:
        logger().warning(
            "workers cannot reload the TLS files",
            uid=account.uid,
            what_to_do=f"let uid {account.uid} read them, or restart the service after each "
            f"change: {reason}",
        )
    return account


def home_of(account: OsAccount) -> str:
    """Return the home directory of an account, where libraries look for files."""
    try:
        return pwd.getpwuid(account.uid).pw_dir
    except KeyError:
        return "/nonexistent"


def give_up_root() -> None:
    """In a worker that listens: permanently become the account that the supervisor chose.

    Raises OSError if that is not possible.
    """
    text = os.environ.get(ACCOUNT_VARIABLE)
    if text is None:
        return
    uid, gid = map(int, text.split(":"))
    folder = Path(os.environ.get("TMPDIR", "/nonexistent"))
    with contextlib.suppress(FileNotFoundError):
        # The socket between the two parts of `native`.
        for path in (folder, *folder.rglob("*")):
            os.lchown(path, uid, gid)
    try:
        os.initgroups(pwd.getpwuid(uid).pw_name, gid)
    except KeyError:
        os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def _belongs_to_root(path: Path) -> bool:
    try:
        return path.stat().st_uid == 0
    except OSError:
        return True


def _stays_root(reason: str) -> None:
    logger().warning("workers run as root", reason=reason)
