"""Seals what browsers and other processes of the console keep for it: encrypted and authenticated.

The console has no database. With a key file that all its processes share, each of them can continue
what another one began. Without a key file, each process uses a random key, and what it sealed is
lost when it stops.

Each console and each purpose has separate keys, derived from those of the file, so that a value
that was sealed for one of them is worthless for any other.
"""

import base64
import binascii
import json
import os
import secrets
import stat
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

__all__ = ["KEYS_MAX", "Box", "StateKeys", "read_keys"]

KEY_BYTES: Final = 32
# The key for new state, and the one before or after it during a change of keys.
KEYS_MAX: Final = 2
# Raise it when the form of any sealed value changes. Then no process reads one of another release.
VERSION: Final = 1
_FILE_BYTES_MAX: Final = 4_096
_HOW: Final = "make one with: openssl rand -base64 32"


class StateKeys:
    """The keys. The first one seals new state, and all of them open earlier state.

    `console` says which console this is. Another one with the same keys opens nothing of this one.
    """

    def __init__(self, keys: Sequence[bytes] = (), console: str = "") -> None:
        given = tuple(keys) or (secrets.token_bytes(KEY_BYTES),)
        self._keys = tuple(_derived(key, f"console: {console}") for key in given)

    def signing(self, purpose: str) -> list[str]:
        """Return keys for `itsdangerous`, which signs with the last one."""
        return [_derived(key, purpose).hex() for key in reversed(self._keys)]

    def box(self, purpose: str, now: Callable[[], datetime]) -> "Box":
        """Return a box for one purpose."""
        keys = [base64.urlsafe_b64encode(_derived(key, purpose)) for key in self._keys]
        return Box(MultiFernet(map(Fernet, keys)), now)


class Box:
    """Seals values for one purpose. The clocks of the processes may differ by a minute."""

    def __init__(self, fernet: MultiFernet, now: Callable[[], datetime]) -> None:
        self._fernet = fernet
        self._now = now

    def seal(self, value: Mapping[str, Any]) -> str:
        """Return the sealed value, which fits into a cookie. The value must be JSON."""
        text = zlib.compress(json.dumps(value, separators=(",", ":")).encode())
        return self._fernet.encrypt_at_time(text, self._seconds()).decode()

    def open(self, text: str, age_max_seconds: float) -> dict[str, Any]:
        """Return the value, or an empty one if it is too old or was not sealed with our keys."""
        try:
            opened = self._fernet.decrypt_at_time(text, int(age_max_seconds), self._seconds())
        except (InvalidToken, ValueError):
            return {}
        value: dict[str, Any] = json.loads(zlib.decompress(opened))
        return value

    def _seconds(self) -> int:
        return int(self._now().timestamp())


def read_keys(path: Path) -> tuple[bytes, ...]:
    """Return the keys of a file: one or two lines of base64, the key for new state first.

    Raises ValueError with the reason. The rules for its owner and mode are those of the service's
    keys: either it belongs to us and only we can read it, or it belongs to root and its group can
    read it too. Kubernetes and Docker mount secrets the second way.
    """
    try:
        with path.open("rb") as file:
            # The file that we read, even if its name leads to another one by now.
            _check(path, os.fstat(file.fileno()))
            text = file.read(_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(text) > _FILE_BYTES_MAX or not 1 <= len(lines) <= KEYS_MAX:
        raise ValueError(f"{path} must contain one key or two, each on a line; {_HOW}")
    keys = tuple(_key(path, line) for line in lines)
    if len(set(keys)) < len(keys):
        raise ValueError(f"{path} contains the same key twice; remove one")
    return keys


def _key(path: Path, line: bytes) -> bytes:
    try:
        # Both alphabets of base64, because tools differ.
        key = base64.b64decode(line.translate(bytes.maketrans(b"-_", b"+/")), validate=True)
    except binascii.Error:
        key = b""
    if len(key) != KEY_BYTES:
        raise ValueError(f"{path} contains a key that is not 32 bytes in base64; {_HOW}")
    return key


def _check(path: Path, status: os.stat_result) -> None:
    of_root = status.st_uid == 0
    if not of_root and status.st_uid != os.geteuid():
        raise ValueError(
            f"{path} belongs to another user, who can change it at any time; "
            f"run: chown {os.geteuid()} {path}"
        )
    forbidden = 0o037 if of_root and os.geteuid() != 0 else 0o077
    if stat.S_IMODE(status.st_mode) & forbidden:
        mode = "640" if forbidden == 0o037 else "600"
        raise ValueError(f"other users can read or change {path}; run: chmod {mode} {path}")


def _derived(key: bytes, purpose: str) -> bytes:
    info = f"latchkey console {VERSION}: {purpose}".encode()
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(key)
