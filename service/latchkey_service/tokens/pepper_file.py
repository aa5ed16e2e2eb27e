"""Reads and writes the pepper file: one key per line, newest first, readable by its owner only.

Does not own the rules about which peppers a host needs (`fleet.py`) or their registration with the
database (`pepper_enrolment.py`).
"""

import contextlib
import os
import re
import secrets
from pathlib import Path

from latchkey_service.secret_format import Keyring, Pepper
from latchkey_service.settings.file_access import PEPPERS, refusal

__all__ = [
    "Draft",
    "PepperFileError",
    "PepperFileExists",
    "PepperFileMissing",
    "load",
    "load_or_create",
    "parse",
    "render",
]

KEY_BYTES = 32
_HEADER = """\
# Latchkey's peppers: the keys for the digests of secrets. One key per line (64 hexadecimal digits),
# newest first. New tokens use the first key; all keys are used to verify. If a key is lost, every
# token created with it stops working.
# Every host of the same database needs a copy of this file.
# To rotate: append a new key (openssl rand -hex 32) on every server and restart them. Then move it
# to the top on every server and restart them.
"""


class PepperFileError(Exception):
    """The pepper file cannot be used. The message says what to do and contains no key."""


class PepperFileMissing(PepperFileError):
    """There is no pepper file."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"there is no pepper file at {path}")


class PepperFileExists(PepperFileError):
    """A new key cannot become the pepper file, because another file is there by now."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"there is already a pepper file at {path}")


class Draft:
    """A new key in a hidden file beside `path`, which becomes the pepper file whole or not at all.

    A half-written key must never create a token. The constructor writes the hidden file, before any
    lock is held. Raises PepperFileError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._placed = False
        # Not named after the process id, which is the same in every container: an earlier container
        # may have crashed and left its file.
        self._draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        key = secrets.token_hex(KEY_BYTES)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(_HEADER + key + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self.discard()
            raise PepperFileError(f"cannot write the pepper file {path}: {error}") from None
        self.keyring = parse(key)

    def check_vacant(self) -> None:
        """Raise PepperFileExists if there is a pepper file other than this draft."""
        if not self._placed and self.path.exists():
            raise PepperFileExists(self.path)

    def put_in_place(self) -> None:
        """Make it the pepper file. Idempotent. Raises PepperFileExists if there is another one."""
        if self._placed:
            return
        try:
            # link, not rename: of two servers that start at once, the second must not replace the
            # file of the first.
            os.link(self._draft, self.path)
        except FileExistsError:
            raise PepperFileExists(self.path) from None
        except OSError as error:
            raise PepperFileError(f"cannot write the pepper file {self.path}: {error}") from None
        self._placed = True

    def withdraw(self) -> None:
        """Remove the pepper file again, if it is this draft's."""
        if self._placed:
            self.path.unlink(missing_ok=True)
            self._placed = False

    def discard(self) -> None:
        """Remove the hidden file. The pepper file stays, if it was put in place."""
        with contextlib.suppress(OSError):
            self._draft.unlink()


def load_or_create(path: Path, *, create: bool) -> Keyring:
    """Return the keyring in `path`, without the database (see `pepper_enrolment.py`).

    With `create`, a missing file is created with one new key and mode 0600. Raises PepperFileError.
    """
    if create and not path.exists():
        draft = Draft(path)
        with contextlib.suppress(PepperFileExists):
            draft.put_in_place()
        draft.discard()
    return load(path)


def load(path: Path) -> Keyring:
    """Return the keyring in `path`. Raises PepperFileError."""
    try:
        with path.open() as file:
            status = os.fstat(file.fileno())
            lines = file.read().splitlines()
    except FileNotFoundError:
        raise PepperFileMissing(path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise PepperFileError(f"cannot read the pepper file {path}: {error}") from None
    if (problem := refusal(path, status, PEPPERS)) is not None:
        raise PepperFileError(f"the pepper file is not safe: {problem}")
    keys = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
            raise PepperFileError(f"{path}, line {number}: a key must be 64 hexadecimal digits")
        keys.append(text.lower())
    if not keys:
        raise PepperFileError(f"the pepper file {path} contains no key")
    if len(set(keys)) < len(keys):
        raise PepperFileError(f"the pepper file {path} contains a key twice")
    return parse(" ".join(keys))


def parse(line: str) -> Keyring:
    """Return the keyring that `render` wrote as `line`. Raises PepperFileError."""
    try:
        return Keyring([Pepper(bytes.fromhex(key)) for key in line.split()])
    except ValueError:
        raise PepperFileError("the supervisor sent no valid peppers") from None


def render(keyring: Keyring) -> str:
    """Return the keys as one line, for the pipe to a worker and for nothing else."""
    return " ".join(pepper.key.hex() for pepper in keyring.peppers) + "\n"
