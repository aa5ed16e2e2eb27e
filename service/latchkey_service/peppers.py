"""Where peppers are kept: one key per line, newest first, in a file that only its owner reads."""

import os
import re
import secrets
from pathlib import Path

from latchkey_service.secrets import Keyring, Pepper

__all__ = ["PepperFileError", "load_or_create", "parse", "render"]

KEY_BYTES = 32
_HEADER = """\
# Latchkey's peppers: keys for the digests of secrets, one of 64 hexadecimal digits per line,
# newest first. The first mints, all of them read. Losing a key kills every token minted with it.
# To rotate: put a new line (openssl rand -hex 32) below the others on every server and restart,
# then move it to the top on every server and restart.
"""


class PepperFileError(Exception):
    """The pepper file cannot be used. The message says what to do and contains no key."""


def load_or_create(path: Path, *, create: bool) -> Keyring:
    """Return the keyring kept in `path`.

    With `create`, a missing file is made with one new key, mode 0600. Raises PepperFileError.
    """
    if create:
        _create_if_missing(path)
    try:
        with path.open() as file:
            status = os.fstat(file.fileno())
            lines = file.read().splitlines()
    except FileNotFoundError:
        raise PepperFileError(f"there is no pepper file at {path}") from None
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


def _create_if_missing(path: Path) -> None:
    """Make the file whole or not at all: a half-written key must never mint."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not named by the process id: in containers all have the same, also one that crashed here.
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(_HEADER + secrets.token_hex(KEY_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        # link, and not rename: of two servers that start at once, the second keeps the first's.
        os.link(draft, path)
    except FileExistsError:
        pass
    except OSError as error:
        raise PepperFileError(f"cannot write the pepper file {path}: {error}") from None
    finally:
        draft.unlink(missing_ok=True)
