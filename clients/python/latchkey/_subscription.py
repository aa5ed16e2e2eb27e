"""What the Watch streams of one memory add up to: its lease. Pure; the clock is passed in.

It owns the client's part of the coherence rules 6, 7 and 12: apply, then acknowledge, then extend;
count a lease from before its request was sent; one stream's grants at a time; start over when the
history is another one. It talks to nobody:
`_watch` carries between it and the service. All times are seconds of
`latchkey_coherence.lease.boottime`.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from latchkey_coherence.lease import client_lease_end
from latchkey_coherence.memory import NOWHERE, Memory, Position

from latchkey._entry import Remembered

# When to ask for the next grant: with this share of the lease left, at random so that a thousand
# clients of one server do not march in step. Later would spare the server messages, and leave too
# little time to find another stream, when this one has fallen silent, before the lease is over.
ASK_SHARE_MIN: Final = 0.35
ASK_SHARE_MAX: Final = 0.5
# A server that grants next to nothing is not to be asked without a pause.
ASK_GAP_SECONDS: Final = 0.1
# How long a new stream may take to its first grant: connection, and a server that has to renew
# its own lease. A proxy that holds up streams never brings it.
FIRST_GRANT_SECONDS: Final = 2.0
# With what share of the rest of the lease unused a grant that was asked for is late: the other part
# is for finding another stream.
LATE_SHARE: Final = 0.5
# What any further grant may take at the least, however little of the lease is left.
NEXT_GRANT_SECONDS_MIN: Final = 0.2
# Nobody grants that long; it bounds what a confused server can do.
LEASE_SECONDS_MAX: Final = 60.0


@dataclass(frozen=True, slots=True)
class Request:
    """What the client says: what it has applied, and what it asks for."""

    applied: Position
    number: int = 0
    """Asks for the grant of this number. 0: for none."""
    released: bool = False


@dataclass(frozen=True, slots=True)
class Invalidation:
    """Names tokens to forget."""

    position: Position
    token_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Grant:
    """Permits to answer from memory for `seconds` from the request of that number on."""

    position: Position
    number: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Reset:
    """Everything has to be forgotten, and the lease ends."""

    position: Position


@dataclass(frozen=True, slots=True)
class Closing:
    """The stream grants no more: the server is about to stop, or wants its client to move."""


Event = Invalidation | Grant | Reset | Closing


class Lease:
    """Until when answers may come from memory."""

    # An object of its own for the sake of who reads it on every verify.
    __slots__ = ("__weakref__", "end")

    def __init__(self) -> None:
        self.end = -math.inf

    def drop(self) -> None:
        """Answer no more from memory, until another grant comes."""
        self.end = -math.inf


class Subscription:
    """A memory, the lease on it, and the one stream whose grants count."""

    def __init__(self, memory: Memory[Remembered], randomness: Callable[[], float]) -> None:
        self.memory = memory
        self.lease = Lease()
        self.invalidations = 0
        self.resets = 0
        self._randomness = randomness
        self._granting: Stream | None = None
        # Rises when the memory starts over, since what other streams know of it is then wrong, and
        # when all grants are given up.
        self._epoch = 0

    def open(self, now: float) -> "Stream":
        """Return a new stream, which has its first request to send."""
        return Stream(self, now)

    def release(self) -> None:
        """Answer no more under any grant, and let every stream that was asked for one say so."""
        self.lease.drop()
        # A stream may have asked for its first grant. That must not revive the lease.
        self._epoch += 1
        if self._granting is not None:
            self._granting.retire()
            self._granting = None

    # The rest is for Stream.

    def apply(self, position: Position, token_ids: Iterable[str]) -> bool:
        """Forget `token_ids`, and have applied all up to `position`.

        False: the memory knows that revision by another mark. Its history is not the server's, and
        it has to start over.
        """
        if not self.memory.agrees(position):
            return False
        self.memory.apply(position, token_ids)
        return True

    def start_over(self, position: Position) -> None:
        """Forget everything and begin at `position`, without a lease (coherence rule 12).

        A lease permits to answer on the history that it was granted on, and this may be another
        one. So the other streams' grants count no longer.
        """
        self._epoch += 1
        self.lease.drop()
        self.memory.reset(position)

    def extend(self, stream: "Stream", end: float) -> None:
        """Answer under `stream`'s grant until `end`, and under no other one's."""
        if self._granting is not stream:
            if self._granting is not None:
                self._granting.retire()
            self._granting = stream
        # Not the later one of two streams' ends: the one that is left stops waiting for us.
        self.lease.end = end

    def granted_by(self, stream: "Stream") -> bool:
        """Tell whether the lease, if there is one, is `stream`'s."""
        return self._granting is stream

    @property
    def epoch(self) -> int:
        """Return what a stream's grant has to be of."""
        return self._epoch

    def ask_share(self) -> float:
        """Return with how much of a lease left to ask for the next one."""
        return ASK_SHARE_MIN + (ASK_SHARE_MAX - ASK_SHARE_MIN) * self._randomness()


class Stream:
    """One Watch stream as its client sees it.

    Whoever drives it sends what `take` returns, at once, when `due` has come; hands what was
    received to `receive`, in order; and opens another one when `closing`, or when `late_at` has
    passed.
    """

    def __init__(self, subscription: Subscription, now: float) -> None:
        self.granted = False
        """Whether a grant of it was ever of use."""
        self.closing = False
        """Whether its server is about to stop."""
        self.late_at: float | None = now + FIRST_GRANT_SECONDS
        """When it is to be given up, unless a grant comes before."""
        self._subscription = subscription
        self._epoch = subscription.epoch
        self._number = 0
        self._asked_at: float | None = None  # when the request of that number was made
        self._ask_at: float | None = now
        self._end = -math.inf
        # Where the memory was when this stream last moved it, or was opened. Its server sends what
        # comes after that.
        self._left_at = NOWHERE
        self._owes_ack = False
        self._owes_release = False
        self._retired = False

    def due(self) -> float | None:
        """Return when `take` has something to send. None: not before something was received."""
        self._notice_other_history()
        if self._owes_ack or self._owes_release:
            return -math.inf
        return self._ask_at

    def take(self, now: float) -> Request | None:
        """Return what is to be sent at `now`, which was read just before. None: nothing."""
        self._notice_other_history()
        applied = self._subscription.memory.position
        if self._retired:
            owed, self._owes_release = self._owes_release, False
            return Request(applied, released=True) if owed else None
        asks = self._ask_at is not None and now >= self._ask_at
        if not asks and not self._owes_ack:
            return None
        self._owes_ack = False
        if not asks:
            return Request(applied)
        if not self._number:
            self._left_at = applied
        self._number += 1
        self._asked_at, self._ask_at = now, None
        if self.granted:
            patience = (self._end - now) * (1 - LATE_SHARE)
            self.late_at = now + max(patience, NEXT_GRANT_SECONDS_MIN)
        return Request(applied, number=self._number)

    def receive(self, event: Event | None, now: float) -> None:
        """Take in what the server sent. None stands for something that is not known here."""
        self._notice_other_history()
        if self._retired:
            return  # another stream says it all
        subscription = self._subscription
        match event:
            case Invalidation():
                self._receive_invalidation(event, now)
            case Grant():
                self._receive_grant(event, now)
            case Reset():
                self._reset(event.position, now)
                subscription.resets += 1
                self._owes_ack = True
            case Closing():
                self.closing = True
                self._asked_at = self._ask_at = self.late_at = None
            case None:
                # A newer server's: to forget is safe, whatever it meant.
                subscription.memory.reset(subscription.memory.position)
                subscription.resets += 1

    def retire(self) -> None:
        """Count no more grants of this stream, and tell its server that they are not needed."""
        if self._retired:
            return
        self._retired = True
        # Also for a grant that is still on its way.
        self._owes_release = self._number > 0
        self._owes_ack = False
        self._asked_at = self._ask_at = self.late_at = None

    def _receive_invalidation(self, event: Invalidation, now: float) -> None:
        """Apply an invalidation, unless its server may follow another history than the memory.

        Two streams can be open, to servers on different histories. Each server names what changed
        since this stream last moved the memory. If the other stream has moved it since, then
        nothing says that this server knows of that change: its position must not become the
        memory's, or answers read there would be believed (coherence rule 12).
        """
        subscription, memory = self._subscription, self._subscription.memory
        position = event.position
        subscription.invalidations += 1
        apart = memory.position != self._left_at and not memory.knows(position)
        if apart and position.revision > memory.position.revision:
            # To forget does no harm, whatever history names them.
            memory.apply(memory.position, event.token_ids)
            if subscription.granted_by(self):
                self._reset(position, now)
            else:
                self._leave()
                return
        elif not subscription.apply(position, event.token_ids):
            self._reset(NOWHERE, now)
        elif memory.position == position or memory.knows(position):
            # A server without marks has no position that is known.
            self._left_at = position
        self._owes_ack = True

    def _reset(self, position: Position, now: float) -> None:
        """Have the memory start over at `position`, and go on without this stream's grants.

        An open request stays open: the server answers it after the Reset, for the new history.
        """
        self._subscription.start_over(position)
        self._left_at = position
        self._epoch = self._subscription.epoch
        self._end = -math.inf
        if self._asked_at is None and not self.closing:
            self._ask_at = now

    def _notice_other_history(self) -> None:
        """Leave the stream if another one has made the memory start over, or after `release`.

        Its server believes the memory to be where it was, and so would not name all that it has to
        drop. A new stream finds out where it is.
        """
        if self._epoch != self._subscription.epoch and not self._retired:
            self._leave()

    def _leave(self) -> None:
        """Give the stream up, and have whoever drives it open another one."""
        self.retire()
        self.closing = True

    def _receive_grant(self, grant: Grant, now: float) -> None:
        if self._asked_at is None or grant.number != self._number:
            return  # of no request that is still open
        if not self._subscription.memory.knows(grant.position):
            return  # of another history, or of one that was never explained
        asked_at, self._asked_at = self._asked_at, None
        end = client_lease_end(asked_at, min(grant.seconds, LEASE_SECONDS_MAX))
        if end > now:
            # It only grows: the server heeds each of its grants to the end.
            self._end = max(self._end, end)
            self._subscription.extend(self, self._end)
            self.granted = True
            self.late_at = None
        length = max(end - asked_at, 0.0)
        self._ask_at = max(end - length * self._subscription.ask_share(), now + ASK_GAP_SECONDS)
