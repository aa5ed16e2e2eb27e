"""Where peppers are kept: one key per line, newest first, in a file that only its owner reads."""

import contextlib
import os
import re
import secrets
from pathlib import Path

from latchkey_service.secret_format import Keyring, Pepper

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
# Latchkey's peppers: keys for the digests of secrets, one of 64 hexadecimal digits per line,
# newest first. The first mints, all of them read. Losing a key kills every token minted with it.
# Every host of the same database needs a copy of this file.
# To rotate: put a new line (openssl rand -hex 32) below the others on every server and restart,
# then move it to the top on every server and restart.
"""


class PepperFileError(Exception):
    """The pepper file cannot be used. The message says what to do and contains no key."""


class PepperFileMissing(PepperFileError):
    """There is no pepper file."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"there is no pepper file at {path}")


class PepperFileExists(PepperFileError):
    """A new key cannot become the pepper file, because there is one by now."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"there is already a pepper file at {path}")


class Draft:
    """A new key in a hidden file beside `path`, which becomes the pepper file whole or not at all.

    A half-written key must never mint. Writing takes place here, before any lock is held. Raises
    PepperFileError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._placed = False
        # Not named by the process id: containers all have the same one, and one of them may have
        # crashed here.
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
            # link, and not rename: of two servers that start at once, the second keeps the first's.
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
    """Return the keyring kept in `path`, without asking a database (`pepper_enrolment.py` does).

    With `create`, a missing file is made with one new key, mode 0600. Raises PepperFileError.
    """
    if create and not path.exists():
        draft = Draft(path)
        with contextlib.suppress(PepperFileExists):
            draft.put_in_place()
        draft.discard()
    return load(path)


def load(path: Path) -> Keyring:
    """Return the keyring kept in `path`. Raises PepperFileError."""
    try:
        with path.open() as file:
            status = os.fstat(file.fileno())
            lines = file.read().splitlines()
    except FileNotFoundError:
        raise PepperFileMissing(path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise PepperFileError(f"cannot read the pepper file {path}: {error}") from None
    # A secret that an orchestrator mounts belongs to root, and is ours by its group (0440).
    open_to_others = 0o077 if status.st_uid == os.geteuid() else 0o037
    if status.st_mode & open_to_others:
        raise PepperFileError(f"other users may read the pepper file {path}: chmod 600 it")
    keys = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
            raise PepperFileError(f"{path}, line {number}: a key is 64 hexadecimal digits")
        keys.append(text.lower())
    if not keys:
        raise PepperFileError(f"the pepper file {path} holds no key")
    if len(set(keys)) < len(keys):
        raise PepperFileError(f"the pepper file {path} holds a key twice")
    return parse(" ".join(keys))


def parse(line: str) -> Keyring:
    """Return the keyring that `render` made a line of. Raises PepperFileError."""
    try:
        return Keyring([Pepper(bytes.fromhex(key)) for key in line.split()])
    except ValueError:
        raise PepperFileError("no peppers came from the supervisor") from None


def render(keyring: Keyring) -> str:
    """Return the keys as one line, for a pipe to a process of our own and for nothing else."""
    return " ".join(pepper.key.hex() for pepper in keyring.peppers) + "\n"
