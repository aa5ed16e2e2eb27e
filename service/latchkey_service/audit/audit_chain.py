"""The chain of the audit log: shows whether entries were changed, removed or added later. Pure.

Every few seconds, one worker combines the entries that no batch covers yet into the next batch. A
batch's digest covers its entries and the digest of the batch before it, and so all entries up to
then. Its seal is an HMAC of the digest, with a key derived from the newest pepper. An attacker who
can write to the database, but has no pepper, cannot compute it.

Retention removes whole batches from the beginning, and stores a sealed start. So only a holder of a
pepper can remove entries from the beginning without a trace. To remove entries from the end,
somebody must remove every batch since then. No row in the database can show that: compare the
newest batch with one that was noted elsewhere, as the log and the metrics do.
"""

import hmac
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Final, NamedTuple

from latchkey_service.audit.audit_table import Entry
from latchkey_service.secret_format import Keyring

__all__ = ["NO_BATCH", "Batch", "ChainKeys", "Head", "Start", "batch_digest"]

_BATCH_USE: Final = b"latchkey audit batch\0"
_KEY_USE: Final = b"latchkey audit chain\0"
_SEAL_USE: Final = b"batch\0"
_START_USE: Final = b"start\0"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


class Head(NamedTuple):
    """The number of a batch, and its digest."""

    number: int
    digest: bytes

    def __str__(self) -> str:
        """Return the form for people: `NUMBER:DIGEST`."""
        return f"{self.number}:{self.digest.hex()}"


class Batch(NamedTuple):
    """A stored batch."""

    number: int
    entry_ids: Sequence[int]
    digest: bytes
    pepper_id: str
    seal: bytes
    time: datetime
    """The time of its newest entry."""

    @property
    def head(self) -> Head:
        """The batch's number and digest."""
        return Head(self.number, self.digest)


class Start(NamedTuple):
    """The last batch whose entries retention has removed. 0: none."""

    number: int
    pepper_id: str | None
    seal: bytes | None


NO_BATCH: Final = Head(0, bytes(32))
"""Stands for the batch before the first one."""


class ChainKeys:
    """The keys of seals, derived from the peppers."""

    def __init__(self, keyring: Keyring) -> None:
        self.newest_id = keyring.peppers[0].id
        self._keys = {
            pepper.id: hmac.digest(pepper.key, _KEY_USE, "sha256") for pepper in keyring.peppers
        }

    def knows(self, pepper_id: str | None) -> bool:
        """Return whether there is a key for this pepper."""
        return pepper_id in self._keys

    def seal(self, head: Head) -> bytes:
        """Seal a batch with the newest pepper."""
        return self._mac(self.newest_id, _SEAL_USE, head)

    def seal_start(self, head: Head) -> bytes:
        """Seal a start with the newest pepper."""
        return self._mac(self.newest_id, _START_USE, head)

    def is_genuine(self, batch: Batch) -> bool:
        """Return whether a batch's seal is valid. Its pepper must be known."""
        return hmac.compare_digest(self._mac(batch.pepper_id, _SEAL_USE, batch.head), batch.seal)

    def is_genuine_start(self, start: Start, head: Head) -> bool:
        """Return whether a start's seal is valid for `head`, the batch that it names."""
        return (
            start.pepper_id in self._keys
            and start.seal is not None
            and start.number == head.number
            and hmac.compare_digest(self._mac(start.pepper_id, _START_USE, head), start.seal)
        )

    def _mac(self, pepper_id: str, use: bytes, head: Head) -> bytes:
        return hmac.digest(self._keys[pepper_id], use + _encoded(head), "sha256")


def batch_digest(before: Head, entries: Iterable[Entry]) -> bytes:
    """Return the digest of the batch after `before`, of entries in the order of their ids."""
    digest = sha256(_BATCH_USE + _encoded(before))
    for entry in entries:
        # A JSON list separates its elements unambiguously, and contains no line break.
        fields = entry._replace(time=(entry.time - _EPOCH) // _MICROSECOND)  # type: ignore[arg-type]
        # Entries from before migration 0019 have no trace id, and keep their digest.
        covered = fields if entry.trace_id else fields[:-1]
        digest.update(json.dumps(covered).encode() + b"\n")
    return digest.digest()


def _encoded(head: Head) -> bytes:
    return head.number.to_bytes(8) + head.digest
