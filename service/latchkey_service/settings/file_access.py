"""Who may read and change the files that the service depends on. Judges owner and mode.

The rules for keys are those of Postgres for its own (`ssl_key_file`): either a key belongs to us
and only we can read it, or it belongs to root and its group can read it too. Kubernetes and Docker
mount secrets the second way. Anyone who can change the other files controls the service, so they
must belong to us or root too. Symbolic links are followed, and the rules apply to the target.
"""

import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = [
    "CERTIFICATE",
    "ENVIRONMENT",
    "PEPPERS",
    "POLICY",
    "TLS_KEY",
    "WEBHOOK_SECRETS",
    "Rule",
    "refusal",
    "warning",
]

_ROOT: Final = 0


@dataclass(frozen=True, slots=True)
class Rule:
    """The owners and modes that a file may have.

    `refused` and `warned` are the mode bits that our own files must not have; `refused_of_root` and
    `warned_of_root` are the same for files that belong to root. Without `any_owner`, a file of
    another user is refused; with it, there is a warning.
    """

    refused: int
    refused_of_root: int
    warned: int = 0
    warned_of_root: int = 0
    any_owner: bool = False
    # The modes that `chmod` should set: for our own files, and for root's if we are not root.
    mode: str = "600"
    mode_of_root: str = "640"


PEPPERS: Final = Rule(refused=0o077, refused_of_root=0o037)
WEBHOOK_SECRETS: Final = PEPPERS
# Kubernetes mounts a secret with 0644 by default. In a container, there are no other users.
TLS_KEY: Final = Rule(refused=0o077, refused_of_root=0o033, warned_of_root=0o004)
# May contain the password of the database.
ENVIRONMENT: Final = Rule(0o002, 0o002, warned=0o024, warned_of_root=0o024)
# Names callers and their rights. Its digests reveal nothing. In a container, a file that is mounted
# from the host may belong to a user of the host.
POLICY: Final = Rule(0o002, 0o002, warned=0o024, warned_of_root=0o024, any_owner=True, mode="640")
# Public, but no other user may choose whom we trust.
CERTIFICATE: Final = Rule(
    0o002, 0o002, warned=0o020, warned_of_root=0o020, any_owner=True, mode="644", mode_of_root="644"
)


def refusal(path: Path, status: os.stat_result, rule: Rule) -> str | None:
    """Return why a file must not be used and what to do about it, or None."""
    owned_by_root = status.st_uid == _ROOT
    if not owned_by_root and status.st_uid != os.geteuid() and not rule.any_owner:
        return _owner(path, status)
    return _mode(path, status, rule, rule.refused_of_root if owned_by_root else rule.refused)


def warning(path: Path, rule: Rule) -> str | None:
    """Return what is wrong with a file that may be used, and what to do about it, or None."""
    try:
        status = path.stat()
    except OSError:
        # The reader of the file reports this.
        return None
    owned_by_root = status.st_uid == _ROOT
    if not owned_by_root and status.st_uid != os.geteuid():
        return _owner(path, status)
    return _mode(path, status, rule, rule.warned_of_root if owned_by_root else rule.warned)


def _owner(path: Path, status: os.stat_result) -> str:
    return (
        f"{path} belongs to another user ({_name(status.st_uid)}), who can change it at any time; "
        f"run: chown {_name(os.geteuid())} {path}"
    )


def _mode(path: Path, status: os.stat_result, rule: Rule, forbidden: int) -> str | None:
    found = stat.S_IMODE(status.st_mode) & forbidden
    if not found:
        return None
    # The larger group of users, and the most harmful of its rights.
    circle, bits = ("other users", found & 7) if found & 7 else ("its group", found >> 3)
    what = "change" if bits & 2 else "read" if bits & 4 else "execute"
    mode = rule.mode_of_root if status.st_uid == _ROOT != os.geteuid() else rule.mode
    return f"{circle} can {what} {path}; run: chmod {mode} {path}"


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        # In a container, most uids have no name.
        return str(uid)
