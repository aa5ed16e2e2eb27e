"""Counts the uses of tokens until they are written: aggregation, limits and times. Pure.

A use is a verify that was answered VALID. The servicer counts the uses of this process, and hands
over those that client libraries report on their Watch streams. `usage_writer.py` writes them to
Postgres, with the SQL of `usage_table.py`.

Times are seconds of Unix time, passed in.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final, NamedTuple

from latchkey_service.coherence.watch_events import ReportedUse
from latchkey_service.secret_format import hint_of
from latchkey_service.tokens.verdict import CachedToken

__all__ = ["DAYS_MAX", "USES_PENDING_MAX", "PendingUses", "Use"]

# Daily counts are kept for this long. Ages of reported uses are limited to it.
DAYS_MAX: Final = 90
# Combinations of secret and caller that wait to be written, at about 400 bytes each. Enough for
# each of the default 100,000 cached tokens of one client to be used between two writes.
USES_PENDING_MAX: Final = 100_000
# At this share of the maximum, the uses are written early, so that there is room for new ones.
EARLY_SHARE: Final = 0.25
# All reports together may take this share of the maximum, because a client may report made-up uses.
# The rest is for the verifies that this process answers.
REPORTED_SHARE: Final = 0.75
# More than all threads of a client can verify in a second. Limits a made-up count.
USES_PER_SECOND_MAX: Final = 10_000_000
# Of one entry. Sums of many entries still fit into the database's 64-bit counts.
COUNT_MAX: Final = 2**40
_AGE_SECONDS_MAX: Final = DAYS_MAX * 86_400.0
_TOKEN_ID_LENGTH_MAX: Final = 64
# The longest prefix has 10 letters.
_HINT_LENGTH_MAX: Final = 16


class Use(NamedTuple):
    """The uses of one secret by one caller."""

    token_id: str
    hint: str
    caller: str
    first: float
    last: float
    uses: int


_Key = tuple[str, str, str]


class Pending:
    """The uses of one secret by one caller since they were last taken."""

    __slots__ = ("_record", "caller", "count", "first", "last", "reported")

    def __init__(self, caller: str, first: float, *, reported: bool) -> None:
        self.caller = caller
        self.reported = reported
        """Whether the entry began with a report."""
        self.first = self.last = first
        self.count = 0
        self._record: CachedToken | None = None

    def point_from(self, record: CachedToken | None) -> None:
        """Have `record` point at this entry, and no other record."""
        previous = self._record
        if previous is not None and previous.use is self:
            previous.use = None
        self._record = record
        if record is not None:
            record.use = self


class PendingUses:
    """The uses that wait to be written. Event loop only.

    `on_filling` is called when the uses should be written early.
    """

    def __init__(self, on_filling: Callable[[], None], entries_max: int = USES_PENDING_MAX) -> None:
        self.dropped = 0
        """Uses that found no room. Reset by `take_dropped`."""
        self.on_filling = on_filling
        self._entries_max = entries_max
        self._early_at = max(1, int(entries_max * EARLY_SHARE))
        self._reported_max = max(1, int(entries_max * REPORTED_SHARE))
        self._pending: dict[_Key, Pending] = {}
        # Entries that began with a report, by caller.
        self._reported: Counter[str] = Counter()
        self._reported_total = 0

    def __len__(self) -> int:
        return len(self._pending)

    def count(self, record: CachedToken, presented: str, caller: str, now: float) -> None:
        """Count a verify of `presented`, whose token is `record`, that was answered VALID.

        Lets `record.use` refer to the entry until the entry is taken. While it does, and the caller
        is the same, the servicer may count on the entry itself, which costs two assignments.
        """
        key = (record.token_id, hint_of(presented), caller)
        pending = self._pending.get(key) or self._add(key, now)
        if pending is None:
            self.dropped += 1
            return
        pending.point_from(record)
        pending.count += 1
        pending.last = now

    def report(self, caller: str, uses: Iterable[ReportedUse], now: float) -> None:
        """Add uses that a client of `caller` reports. Corrects what cannot be true."""
        for use in uses:
            if not _is_storable(use.token_id, _TOKEN_ID_LENGTH_MAX):
                continue
            hint = use.hint if _is_storable(use.hint, _HINT_LENGTH_MAX) else ""
            key = (use.token_id, hint, caller)
            last_age = min(max(use.last_age_seconds, 0.0), _AGE_SECONDS_MAX)
            first_age = min(max(use.first_age_seconds, last_age), _AGE_SECONDS_MAX)
            count_max = int((first_age - last_age + 1.0) * USES_PER_SECOND_MAX)
            count = min(max(use.uses, 0), count_max)
            pending = self._pending.get(key)
            if pending is None:
                if self._may_report(caller):
                    pending = self._add(key, now - last_age, reported=True)
                if pending is None:
                    self.dropped += count
                    continue
                self._reported[caller] += 1
                self._reported_total += 1
            pending.first = min(pending.first, now - first_age)
            pending.last = max(pending.last, now - last_age)
            pending.count = min(pending.count + count, COUNT_MAX)

    def take(self, entries_max: int) -> list[Use]:
        """Remove and return up to `entries_max` entries, sorted by token, secret and caller.

        Servers that write at the same time lock rows in this order, so they do not deadlock.
        """
        keys = sorted(islice(self._pending, entries_max))
        uses = []
        for key in keys:
            pending = self._pending.pop(key)
            pending.point_from(None)
            uses.append(Use(*key, pending.first, pending.last, pending.count))
            if pending.reported:
                self._reported[pending.caller] -= 1
                self._reported_total -= 1
        # Callers without entries would only take memory.
        self._reported = +self._reported
        return uses

    def take_dropped(self) -> int:
        """Return how many uses found no room since the last call."""
        dropped, self.dropped = self.dropped, 0
        return dropped

    def _may_report(self, caller: str) -> bool:
        """Return whether a report of `caller` may begin another entry.

        A caller may have no more entries than there are free places for reports, so the next caller
        finds room too (as in `rpc/admission.py`).
        """
        return self._reported[caller] < self._reported_max - self._reported_total

    def _add(self, key: _Key, now: float, *, reported: bool = False) -> Pending | None:
        """Return a new entry, or None if there is no room."""
        if len(self._pending) >= self._entries_max:
            return None
        pending = self._pending[key] = Pending(key[2], now, reported=reported)
        if len(self._pending) == self._early_at:
            self.on_filling()
        return pending


def _is_storable(text: str, length_max: int) -> bool:
    """Return whether Postgres can store `text`, which a client chose, in a key."""
    return 0 < len(text) <= length_max and text.isprintable()
