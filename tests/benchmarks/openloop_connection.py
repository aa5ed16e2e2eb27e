"""A connection of the open loop, with calls in flight until they are answered or expire."""

import contextlib
import socket
import time
from collections import Counter
from dataclasses import dataclass, field

from tests.benchmarks import http2
from tests.benchmarks.http2 import (
    CANCEL,
    CONTINUATION,
    DATA,
    DATA_FRAME,
    END_HEADERS,
    END_STREAM,
    FRAME,
    GOAWAY,
    HEADER_TABLE_SIZE,
    HEADERS,
    MAX_CONCURRENT_STREAMS,
    PADDED,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    LoadError,
    frame,
    header_blocks,
)
from tests.benchmarks.statuses import (
    DEADLINE_EXCEEDED,
    OK,
    RESOURCE_EXHAUSTED,
    UNAVAILABLE,
    HeaderError,
    Statuses,
)

__all__ = ["UNLIMITED", "Connection", "Sent", "Tally"]

UNLIMITED = 2**31

# Arrival time (ns of perf_counter), whether it counts, the request.
Sent = tuple[int, bool, bytes]

# Small, because parsing a large read takes long, and nothing is sent meanwhile.
RECEIVE_BYTES = 1 << 15
# Including gRPC's prefix. Each request is sent whole, into a window of 65,535 bytes for all of
# them.
REQUEST_BYTES_MAX = 8_192
# A server that loses more connections is not overloaded but broken.
LOST_MAX = 100
# A prime, as in load.py.
SAMPLE_EVERY = 97
SAMPLES_MAX = 100
# The meaning of a stream's end with RST_STREAM: gRPC over HTTP/2, "Errors".
_OF_RESETS = {0x7: UNAVAILABLE, CANCEL: 1, 0xB: RESOURCE_EXHAUSTED, 0xC: 7}
_INTERNAL = 13


@dataclass(slots=True)
class Tally:
    """The outcomes of calls. Latencies in ns from their arrival.

    All fields but `good` count the calls that arrived within the stretch, whenever they were
    answered. `good` counts the answers within the stretch: in a growing queue, calls arrive at
    twice the rate of answers, and each may still be answered in time.
    """

    sent: int = 0
    good: int = 0
    within: bool = False
    latencies: list[int] = field(default_factory=list)
    refused_latencies: list[int] = field(default_factory=list)
    # By status; right answers in time are only in `latencies`.
    failed: Counter[int] = field(default_factory=Counter)
    # Status OK with a wrong message.
    wrong: int = 0
    connections_lost: int = 0
    # Pairs of request and answer.
    samples: list[tuple[bytes, bytes]] = field(default_factory=list, repr=False)

    @property
    def ok(self) -> int:
        """Return how many were answered rightly and in time."""
        return len(self.latencies)

    @property
    def refused(self) -> int:
        """Return how many were answered RESOURCE_EXHAUSTED."""
        return self.failed[RESOURCE_EXHAUSTED]

    @property
    def unavailable(self) -> int:
        """Return how many were answered UNAVAILABLE, refused unprocessed, or lost with their
        connection."""
        return self.failed[UNAVAILABLE]

    @property
    def too_late(self) -> int:
        """Return how many were out of time, according to the server or the client."""
        return self.failed[DEADLINE_EXCEEDED]

    @property
    def other(self) -> int:
        """Return how many had any other outcome, wrong answers included: there should be none."""
        told = self.refused + self.unavailable + self.too_late
        return self.failed.total() - told + self.wrong


class Connection(http2.Connection):
    """Calls of one method to one server. A lost connection is replaced."""

    def __init__(
        self,
        address: str,
        path: str,
        begins_with: bytes,
        tally: Tally,
        *,
        timeout_seconds: float,
        in_flight_max: int,
    ) -> None:
        super().__init__(address)
        self._address = address
        self._blocks = header_blocks(address, path, f"{round(timeout_seconds * 1_000)}m")
        self._timeout_ns = int(timeout_seconds * 1e9)
        self._in_flight_max = in_flight_max
        self._begins_with = begins_with
        self._tally = tally
        self._begin()

    def _begin(self) -> None:
        self.ready = False
        # To be sent; partly sent; in flight, oldest first; received in pieces.
        self.out: list[bytes] = []
        self.unsent = b""
        self.sent: dict[int, Sent] = {}
        self._answers: dict[int, bytes] = {}
        self._rest = b""
        self._stream = -1
        self._limit = 0
        self._leaving = False
        self._statuses = Statuses()
        headers = frame(HEADERS, END_HEADERS, 0, self._blocks[1])
        self._headers_start, self._headers_end = headers[:5], headers[9:]
        # See statuses.py.
        self._greet({HEADER_TABLE_SIZE: 0})
        self._socket.setblocking(False)

    def fileno(self) -> int:
        return self._socket.fileno()

    def has_room(self) -> bool:
        """Return whether one more call may be put: a free stream within the server's limit, enough
        window, and no bytes left over from the last send."""
        return (
            len(self.sent) < self._limit
            and self._send_window >= REQUEST_BYTES_MAX
            and not self.unsent
        )

    def put(self, sent: Sent) -> None:
        """Begin a call, for which there is room; `flush` sends it."""
        request = sent[2]
        size = len(request) + 5
        if size > REQUEST_BYTES_MAX:
            raise ValueError(f"a request has {REQUEST_BYTES_MAX - 5} bytes at most")
        self._send_window -= size
        self._stream += 2
        stream = self._stream
        if stream == 1:
            self.out.append(frame(HEADERS, END_HEADERS, 1, self._blocks[0]))
        else:
            self.out += (self._headers_start, stream.to_bytes(4, "big"), self._headers_end)
        self.out.append(
            DATA_FRAME.pack(size >> 16, size & 0xFFFF, DATA, END_STREAM, stream, 0, size - 5)
        )
        self.out.append(request)
        self.sent[stream] = sent
        self._tally.sent += sent[1]

    def flush(self) -> None:
        """Send as much as the socket accepts."""
        self.unsent += b"".join(self.out)
        self.out.clear()
        try:
            done = self._socket.send(self.unsent)
        except BlockingIOError:
            return
        except OSError:
            self._lost()
            return
        self.unsent = self.unsent[done:]

    def expire(self, arrived_until: int) -> None:
        """Give up the calls that arrived before that time, and cancel them at the server."""
        late = []
        for stream, sent in self.sent.items():
            if sent[0] > arrived_until:
                break
            late.append(stream)
        for stream in late:
            self._end(stream, DEADLINE_EXCEEDED, 0)
            self.out.append(frame(RST_STREAM, 0, stream, CANCEL.to_bytes(4, "big")))
        self._after()

    def read(self) -> None:
        """Read the available bytes, and record the outcomes of calls."""
        try:
            chunk = self._socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            self._lost()
            return
        now = time.perf_counter_ns()
        buffer = self._rest + chunk if self._rest else chunk
        answers, read_status = self._answers, self._statuses.read
        position, length = 0, len(buffer)
        while length - position >= 9:
            high, low, kind, flags, stream = FRAME.unpack_from(buffer, position)
            start = position + 9
            position = start + (high << 16 | low)
            if position > length:
                position = start - 9
                break
            if kind == DATA:
                if flags & (PADDED | END_STREAM):
                    raise LoadError("the server pads its answers, or ends them without a status")
                self._received += position - start
                answer = buffer[start:position]
                answers[stream] = answers[stream] + answer if stream in answers else answer
            elif kind == HEADERS:
                if flags & (PADDED | PRIORITY) or not flags & END_HEADERS:
                    raise LoadError("the server's headers are larger or other than is usual")
                try:
                    status = read_status(buffer[start:position])
                except HeaderError as error:
                    raise LoadError(str(error)) from error
                if flags & END_STREAM:
                    self._end(stream, _INTERNAL if status is None else status, now)
            elif kind == RST_STREAM:
                code = int.from_bytes(buffer[start:position], "big")
                self._end(stream, _OF_RESETS.get(code, _INTERNAL), now)
            elif kind == CONTINUATION:
                raise LoadError("the server's headers are larger than is usual")
            else:
                self._other(kind, flags, stream, buffer[start:position])
        self._rest = buffer[position:]
        self._give_back(self.out)
        self._after()

    def _after(self) -> None:
        if self._leaving and not self.sent:
            self._again()
        elif self.out:
            self.flush()

    def _end(self, stream: int, status: int, now: int) -> None:
        """Record the outcome of a call. A call that was given up may still be answered."""
        answer = self._answers.pop(stream, b"")
        sent = self.sent.pop(stream, None)
        if sent is None:
            return
        tally, latency = self._tally, now - sent[0]
        if status == OK:
            if not self._is_right(answer):
                tally.wrong += 1
                return
            if latency <= self._timeout_ns:
                tally.good += tally.within
                if sent[1]:
                    tally.latencies.append(latency)
                    if tally.ok % SAMPLE_EVERY == 1 and len(tally.samples) < SAMPLES_MAX:
                        tally.samples.append((sent[2], answer[5:]))
                return
            status = DEADLINE_EXCEEDED
        if sent[1]:
            tally.failed[status] += 1
            if status == RESOURCE_EXHAUSTED:
                tally.refused_latencies.append(latency)

    def _is_right(self, answer: bytes) -> bool:
        whole = int.from_bytes(answer[:5], "big") == len(answer) - 5
        return whole and answer.startswith(self._begins_with, 5)

    def _other(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == GOAWAY:
            # The server did not process calls after the last one; the others may still be answered.
            last = int.from_bytes(payload[:4], "big") & 0x7FFFFFFF
            for later in [stream for stream in self.sent if stream > last]:
                self._end(later, UNAVAILABLE, 0)
            self._leaving, self._limit = True, 0
            return
        self._control(kind, flags, stream, payload, self.out)
        if kind == SETTINGS:
            self.ready = True
            if not self._leaving:
                # RFC 9113 §6.5.2: without the setting there is no limit.
                allowed = self._settings.get(MAX_CONCURRENT_STREAMS, UNLIMITED)
                self._limit = min(allowed, self._in_flight_max)

    def _lost(self) -> None:
        for stream in tuple(self.sent):
            self._end(stream, UNAVAILABLE, 0)
        self._again()

    def _again(self) -> None:
        self._tally.connections_lost += 1
        if self._tally.connections_lost > LOST_MAX:
            raise LoadError("the server loses one connection after the other")
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self.close()
        super().__init__(self._address)
        self._begin()
