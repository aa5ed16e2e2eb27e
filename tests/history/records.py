"""The record of each call that a process makes: start, end and outcome.

Times are nanoseconds of CLOCK_MONOTONIC, which all processes of a machine share. The clock is read
before the call and after its answer. So a delay can only make two calls appear to overlap, and then
every answer is allowed.
"""

import enum
import os
import struct
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["CREATES", "ENDS", "Kind", "Outcome", "Record", "Recorder", "now", "read"]

now = time.monotonic_ns

# kind, outcome, token's number, start, end.
_LAYOUT = struct.Struct("<BBIqq")


class Kind(enum.IntEnum):
    """The method that was called."""

    NOWAIT = 1
    """`Verifier.verify_nowait`, if it had an answer: always from the cache."""
    VERIFY = 2
    """`Verifier.verify`: from the cache, otherwise from the service."""
    DIRECT = 3
    """The RPC Verify, of one server process."""
    CREATE = 4
    DELETE = 5
    COUNTS = 6
    """Not a call: the verifier's counts so far. The start field contains the number of answers from
    the cache, the end field the number of answers from the service, and the token field the
    verifier's number.
    """
    GET = 7
    NARROW_SCOPE = 8
    """This and those below: other changes that end a token (`narrowing.py`)."""
    EXPIRE = 9
    """It ends when the time has come."""
    NARROW_NETWORKS = 10
    NARROW_PERMISSIONS = 11
    DISABLE = 12
    ROTATE = 13
    RETIRE_SECRETS = 14
    REVOKE_SECRET = 15
    DELETE_ALL = 16
    IMPORT = 17
    """As CREATE, but for an existing secret."""


CREATES = frozenset({Kind.CREATE, Kind.IMPORT})
"""The kinds after which a token is VALID until it is ended."""
ENDS = frozenset(
    {Kind.DELETE, *(kind for kind in Kind if Kind.NARROW_SCOPE <= kind <= Kind.DELETE_ALL)}
)
"""The kinds after which no verify may be answered VALID."""


class Outcome(enum.IntEnum):
    """The outcome of a call."""

    FAILED = 0
    """The call ended with an error. A change is then not confirmed, though it may be committed."""
    VALID = 1
    REFUSED = 2
    """Any other verdict."""
    DONE = 3
    """A Create, an Import or a Get succeeded."""
    CONFIRMED = 4
    """A change succeeded, and its receipt says since when the token has been dead everywhere."""
    COMMITTED = 5
    """A change with `no_wait` succeeded: the token may not be dead everywhere yet."""
    NOT_FOUND = 6
    """A change or a Get failed, because the service does not know the token."""


class Record(NamedTuple):
    """One call."""

    kind: int
    outcome: int
    token: int
    began: int
    ended: int


class Recorder:
    """Appends to a file. `add` may be called from any thread, `flush` from one thread at a time.

    If the process is killed, records that were not flushed are lost, as if the calls had not been
    made.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        # Appending and removing at the other end are atomic.
        self._pending: deque[bytes] = deque()

    def add(self, kind: Kind, outcome: Outcome, token: int, began: int, ended: int) -> None:
        """Record a call."""
        self._pending.append(_LAYOUT.pack(kind, outcome, token, began, ended))

    def flush(self) -> None:
        """Pass the added records to the operating system, so that they survive a kill."""
        pending = self._pending
        if pending:
            os.write(self._file, b"".join(pending.popleft() for _ in range(len(pending))))

    def close(self) -> None:
        """Flush, and close the file."""
        self.flush()
        os.close(self._file)


def read(path: Path) -> Iterator[Record]:
    """Return the records of a file. An incomplete record at its end, from a killed process, is
    ignored."""
    data = path.read_bytes()
    whole = len(data) - len(data) % _LAYOUT.size
    # Tuples, not Record objects: there are millions, and most are only compared.
    return map(Record._make, _LAYOUT.iter_unpack(memoryview(data)[:whole]))
