"""The list of tokens to verify, as a file to which one process appends and that many read.

A file instead of a pipe: a stopped reader blocks no one, and a restarted reader continues where the
others are.
"""

import os
from pathlib import Path
from typing import NamedTuple

__all__ = ["Board", "Notice", "Reader"]


class Notice(NamedTuple):
    """A token to verify, or, without a secret, one whose Delete has been confirmed."""

    number: int
    secret: str | None = None


class Board:
    """Announces tokens to all clients."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def created(self, number: int, secret: str) -> None:
        """Announce a token that clients verify from now on."""
        os.write(self._file, f"{number} {secret}\n".encode())

    def deleted(self, number: int) -> None:
        """Announce a confirmed Delete: clients verify the token a little longer."""
        os.write(self._file, f"{number}\n".encode())

    def close(self) -> None:
        os.close(self._file)


class Reader:
    """Reads notices as they come."""

    # A late starter skips old tokens, which are deleted by now.
    BACKLOG_BYTES = 4_096

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CREAT, 0o600)
        size = os.fstat(self._file).st_size
        self._rest = b""
        # Possibly in the middle of a line.
        self._skips = size > self.BACKLOG_BYTES
        if self._skips:
            os.lseek(self._file, size - self.BACKLOG_BYTES, os.SEEK_SET)

    def read(self) -> list[Notice]:
        """Return the new notices. Does not wait."""
        data = self._rest + os.read(self._file, 1 << 16)
        *lines, self._rest = data.split(b"\n")
        if self._skips and lines:
            self._skips = False
            del lines[0]
        notices = []
        for line in lines:
            number, _, secret = line.decode().partition(" ")
            notices.append(Notice(int(number), secret or None))
        return notices
