"""What a process writes down of each call: when it began, when it ended, and how.

Times are nanoseconds of CLOCK_MONOTONIC, which is one clock for all processes of a machine. The
beginning is read before the call is made and the end after its answer is there, so that noise can
only make two calls look as if they overlapped, which allows anything.
"""

import enum
import os
import struct
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Kind", "Outcome", "Record", "Recorder", "now", "read"]

now = time.monotonic_ns

# kind, outcome, token's number, beginning, end.
_LAYOUT = struct.Struct("<BBIqq")


class Kind(enum.IntEnum):
    """What was called."""

    NOWAIT = 1
    """`Verifier.verify_nowait`, where it had an answer: always from memory."""
    VERIFY = 2
    """`Verifier.verify`: from memory, or else from the service."""
    DIRECT = 3
    """The RPC Verify, of one server process."""
    CREATE = 4
    DELETE = 5
    COUNTS = 6
    """No call: how many of the verifier's answers came from memory (in place of the beginning) and
    how many from the service (in place of the end), so far. The token's number is its own."""
    GET = 7


class Outcome(enum.IntEnum):
    """How it ended."""

    FAILED = 0
    """With an error. Of a Delete that means: not confirmed, though it may stand."""
    VALID = 1
    REFUSED = 2
    """Any other verdict."""
    DONE = 3
    """Of a Create or a Get."""
    CONFIRMED = 4
    """Of a Delete: the receipt says since when the token has been dead everywhere."""
    COMMITTED = 5
    """Of a Delete that was asked not to wait: it is not dead everywhere yet."""
    NOT_FOUND = 6
    """Of a Delete or a Get: the service does not know the token."""


class Record(NamedTuple):
    """One call."""

    kind: int
    outcome: int
    token: int
    began: int
    ended: int


class Recorder:
    """Appends to a file. `add` may be called from any thread, `flush` from one at a time.

    What was not flushed when its process is killed is lost: a call that nobody saw.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        # Appending and taking from its other end are atomic.
        self._pending: deque[bytes] = deque()

    def add(self, kind: Kind, outcome: Outcome, token: int, began: int, ended: int) -> None:
        """Write a call down."""
        self._pending.append(_LAYOUT.pack(kind, outcome, token, began, ended))

    def flush(self) -> None:
        """Hand to the operating system what was added, which then survives a kill."""
        pending = self._pending
        if pending:
            os.write(self._file, b"".join(pending.popleft() for _ in range(len(pending))))

    def close(self) -> None:
        """Flush, and close the file."""
        self.flush()
        os.close(self._file)


def read(path: Path) -> Iterator[Record]:
    """Return what a file holds. Half a record at its end, of a process that was killed, is none."""
    data = path.read_bytes()
    whole = len(data) - len(data) % _LAYOUT.size
    # Not a Record each from the start: there are millions, and most are only compared.
    return map(Record._make, _LAYOUT.iter_unpack(memoryview(data)[:whole]))
