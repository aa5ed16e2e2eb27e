"""One HTTP/2 connection of the load: its calls in flight, and their outcomes.

It writes and reads frames as bytes, with only the part of HTTP/2 that a client needs if it knows
the answers: a call costs about 7 µs here, while the fastest server takes 30. h2, grpcio and ghz
take longer for a call than the servers that are measured.
"""

import contextlib
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import hpack
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH

from tests.helpers.raw_http2 import (
    ACK,
    CANCEL,
    CONTINUATION,
    DATA,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADER_TABLE_SIZE,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_CONCURRENT_STREAMS,
    PADDED,
    PING,
    PREFACE,
    PRIORITISED,
    RST_STREAM,
    SETTINGS,
    WINDOW_DEFAULT,
    WINDOW_MAX,
    WINDOW_UPDATE,
    Frame,
)

__all__ = ["UNLIMITED", "Call", "Connection", "LoadError", "Outcome"]

UNLIMITED = 2**31
CONNECT_SECONDS_MAX = 10.0
# Small, because parsing a large read takes long, and nothing is sent meanwhile.
RECEIVE_BYTES = 1 << 15
# Including gRPC's prefix. Each request is sent whole, into a window of 65,535 bytes for all of
# them.
REQUEST_BYTES_MAX = 8_192
# A server that loses more connections is not overloaded but broken.
LOST_MAX = 100
# One in this many answers is kept. A prime, so as not to fall into step with a server's batches.
SAMPLE_EVERY = 97
SAMPLES_MAX = 500

WINDOW_STEP = 1 << 28
# A frame's header, and the same followed by gRPC's prefix of a message.
FRAME, DATA_FRAME = struct.Struct(">BHBBI"), struct.Struct(">BHBBIBI")

OK, UNKNOWN, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, INTERNAL, UNAVAILABLE = 0, 2, 4, 8, 13, 14
# The meaning of a stream's end with RST_STREAM: gRPC over HTTP/2, "Errors".
_OF_RESETS = {0x7: UNAVAILABLE, CANCEL: 1, 0xB: RESOURCE_EXHAUSTED, 0xC: 7}

# Arrival time (ns of perf_counter), whether it counts, the request. In a closed loop (None), the
# time of the answer decides whether it counts.
Call = tuple[int, bool | None, bytes]


class LoadError(Exception):
    """The server does not behave as the load requires; the message says how."""


@dataclass(slots=True)
class Outcome:
    """The outcomes of one traffic. Latencies in ns from a call's arrival, ascending at the end.

    All fields but `good` count the calls that arrived within the stretch, whenever they were
    answered. `good` counts the right answers within the stretch, each in time: in a growing queue,
    calls arrive at twice the rate of answers, and each may still be answered in time.
    """

    timeout_seconds: float
    seconds: float = 0.0
    offered: int = 0
    # Given up at once, because no connection had a free stream.
    held_back: int = 0
    sent: int = 0
    good: int = 0
    latencies: list[int] = field(default_factory=list, repr=False)
    refused_latencies: list[int] = field(default_factory=list, repr=False)
    # By status; right answers in time are only in `latencies`.
    failed: Counter[int] = field(default_factory=Counter)
    # Status OK with a wrong message.
    wrong: int = 0
    connections_lost: int = 0
    # Pairs of request and answer.
    samples: list[tuple[bytes, bytes]] = field(default_factory=list, repr=False)
    # Whether the stretch is in progress.
    within: bool = False

    @property
    def ok(self) -> int:
        """Return how many were answered rightly and in time."""
        return len(self.latencies)

    @property
    def goodput(self) -> float:
        """Return the number of right answers per second, each in time."""
        return self.good / self.seconds

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
    def failures(self) -> int:
        """Return how many had another outcome than a right answer in time."""
        return self.failed.total() + self.wrong

    @property
    def other(self) -> int:
        """Return how many had any other outcome: there should be none."""
        return self.failures - self.refused - self.unavailable - self.too_late

    def percentile_us(self, share: float) -> float:
        """Return the latency in µs below which `share` (0 to 1) of the accepted calls lie. A
        call that came too late, or was never sent, counts with at least its deadline.
        """
        place = int((self.ok + self.too_late) * share)
        if place < self.ok:
            return self.latencies[place] / 1_000
        # All calls were in time, and `share` is 1.
        if self.ok and not self.too_late:
            return self.latencies[-1] / 1_000
        return self.timeout_seconds * 1e6

    def refused_us(self, share: float) -> float:
        """Return the same for the refused calls; 0 if there are none."""
        refused = self.refused_latencies
        return refused[int(len(refused) * share)] / 1_000 if refused else 0.0


class Connection:
    """Calls of one method to one server. In an open loop, a lost connection is replaced."""

    def __init__(
        self,
        address: str,
        path: str,
        begins_with: bytes,
        outcome: Outcome,
        *,
        open_loop: bool,
        in_flight_max: int,
        metadata: Iterable[tuple[str, str]] = (),
    ) -> None:
        host, _, port = address.rpartition(":")
        self._server = host, int(port)
        self._open_loop = open_loop
        fields = [
            *((":method", "POST"), (":scheme", "http"), (":path", path), (":authority", address)),
            *(("content-type", "application/grpc"), ("te", "trailers")),
            *metadata,
        ]
        if open_loop:
            fields.append(("grpc-timeout", f"{round(outcome.timeout_seconds * 1_000)}m"))
        # The first call adds its headers to the server's table, as gRPC's own clients do, and later
        # ones refer to them by number.
        encoder = hpack.Encoder()
        self._first_block, self._block = encoder.encode(fields), encoder.encode(fields)
        self._in_flight_max = in_flight_max
        self._begins_with = begins_with
        self._outcome = outcome
        self._begin()

    def _begin(self) -> None:
        self._socket = socket.create_connection(self._server, CONNECT_SECONDS_MAX)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.ready = False
        # To be sent; partly sent; in flight, oldest first; received in pieces.
        self.out: list[bytes] = []
        self.unsent = b""
        self.sent: dict[int, Call] = {}
        self._answers: dict[int, bytes] = {}
        self._rest = b""
        self._stream = -1
        self._limit = 0
        self._send_window = WINDOW_DEFAULT
        self._received = 0
        headers = Frame(HEADERS, END_HEADERS, 0, self._block).encoded()
        self._headers_start, self._headers_end = headers[:5], headers[9:]
        settings = {ENABLE_PUSH: 0, INITIAL_WINDOW_SIZE: WINDOW_MAX}
        if self._open_loop:
            # Each failed call carries a unique request ID, so no two header blocks are alike. A
            # table without entries makes each block readable by itself (see `_status`).
            settings[HEADER_TABLE_SIZE] = 0
        payload = b"".join(struct.pack(">HI", *pair) for pair in settings.items())
        more = struct.pack(">I", WINDOW_MAX - WINDOW_DEFAULT)
        update = Frame(WINDOW_UPDATE, 0, 0, more).encoded()
        self._socket.sendall(PREFACE + Frame(SETTINGS, 0, 0, payload).encoded() + update)
        self._socket.setblocking(False)

    def close(self) -> None:
        """Close it, whatever is in progress."""
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def has_room(self) -> bool:
        """Return whether one more call may be sent: a free stream within the server's limit, enough
        window, and no bytes left over from the last send."""
        return (
            len(self.sent) < self._limit
            and self._send_window >= REQUEST_BYTES_MAX
            and not self.unsent
        )

    def put(self, call: Call) -> None:
        """Begin a call, for which there is room; `flush` sends it."""
        request = call[2]
        size = len(request) + 5
        if size > REQUEST_BYTES_MAX:
            raise ValueError(f"a request has {REQUEST_BYTES_MAX - 5} bytes at most")
        self._send_window -= size
        self._stream += 2
        stream = self._stream
        if stream == 1:
            self.out.append(Frame(HEADERS, END_HEADERS, 1, self._first_block).encoded())
        else:
            self.out += (self._headers_start, stream.to_bytes(4, "big"), self._headers_end)
        self.out.append(
            DATA_FRAME.pack(size >> 16, size & 0xFFFF, DATA, END_STREAM, stream, 0, size - 5)
        )
        self.out.append(request)
        self.sent[stream] = call
        if call[1]:
            self._outcome.sent += 1

    def flush(self) -> None:
        """Send as much as the socket accepts."""
        if not self.out and not self.unsent:
            return
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
        for stream, call in self.sent.items():
            if call[0] > arrived_until:
                break
            late.append(stream)
        for stream in late:
            self._end(stream, DEADLINE_EXCEEDED, 0)
            self.out.append(Frame(RST_STREAM, 0, stream, CANCEL.to_bytes(4, "big")).encoded())
        self.flush()

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
        answers, open_loop = self._answers, self._open_loop
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
                if flags & (PADDED | PRIORITISED) or not flags & END_HEADERS:
                    raise LoadError("the server's headers are larger or other than is usual")
                if flags & END_STREAM:
                    # A closed loop expects right answers, and does not say why one is wrong.
                    status = _status(buffer[start:position]) if open_loop else OK
                    self._end(stream, status, now)
            elif kind == RST_STREAM:
                code = int.from_bytes(buffer[start:position], "big")
                self._end(stream, _OF_RESETS.get(code, INTERNAL), now)
            elif kind == GOAWAY:
                self._lost()
                return
            else:
                self._control(kind, flags, stream, buffer[start:position])
        self._rest = buffer[position:]
        if self._received > WINDOW_STEP:
            self.out.append(Frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", self._received)).encoded())
            self._received = 0
        self.flush()

    def _end(self, stream: int, status: int, now: int) -> None:
        """Record the outcome of a call. A call that was given up may still be answered."""
        answer = self._answers.pop(stream, b"")
        call = self.sent.pop(stream, None)
        if call is None:
            return
        outcome, latency = self._outcome, now - call[0]
        counts = outcome.within if call[1] is None else call[1]
        if status == OK:
            if int.from_bytes(answer[:5], "big") != len(answer) - 5 or not answer.startswith(
                self._begins_with, 5
            ):
                outcome.wrong += counts
                return
            if not self._open_loop or latency <= outcome.timeout_seconds * 1e9:
                outcome.good += outcome.within
                if counts:
                    outcome.latencies.append(latency)
                    if outcome.ok % SAMPLE_EVERY == 1 and len(outcome.samples) < SAMPLES_MAX:
                        outcome.samples.append((call[2], answer[5:]))
                return
            status = DEADLINE_EXCEEDED
        if counts:
            outcome.failed[status] += 1
            if status == RESOURCE_EXHAUSTED:
                outcome.refused_latencies.append(latency)

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        """Handle a frame that belongs to no call."""
        if kind == SETTINGS and not flags & ACK:
            settings = dict(struct.iter_unpack(">HI", payload))
            if settings.get(INITIAL_WINDOW_SIZE, WINDOW_DEFAULT) < WINDOW_DEFAULT:
                # Each request is sent whole, and none is larger than this.
                raise LoadError("the server's window for a call is smaller than is usual")
            if settings.get(HEADER_TABLE_SIZE, 4096) < 4096:
                raise LoadError("the server's header table is smaller than is usual")
            # RFC 9113 §6.5.2: without the setting there is no limit.
            if MAX_CONCURRENT_STREAMS in settings or not self.ready:
                allowed = settings.get(MAX_CONCURRENT_STREAMS, UNLIMITED)
                self._limit = min(allowed, self._in_flight_max)
                if self._limit < self._in_flight_max and not self._open_loop:
                    raise LoadError(f"the server allows {allowed} calls at once, which is too few")
            self.ready = True
            self.out.append(Frame(SETTINGS, ACK, 0, b"").encoded())
        elif kind == PING and not flags & ACK:
            self.out.append(Frame(PING, ACK, 0, payload).encoded())
        elif kind == WINDOW_UPDATE and stream == 0:
            self._send_window += int.from_bytes(payload, "big")
        elif kind == CONTINUATION:
            raise LoadError("the server's headers are larger than is usual")

    def _lost(self) -> None:
        """Count the calls in flight as failed, and connect again."""
        for stream in tuple(self.sent):
            self._end(stream, UNAVAILABLE, 0)
        self._outcome.connections_lost += 1
        if not self._open_loop or self._outcome.connections_lost > LOST_MAX:
            raise LoadError("the server closed the connection, or one after another")
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self.close()
        self._begin()


def _texts(text: str) -> Iterable[bytes]:
    """Return the two encodings of a short text, RFC 7541 §5.2."""
    plain = text.encode()
    code = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH).encode(plain)
    return bytes([len(plain)]) + plain, bytes([0x80 | len(code)]) + code


_STATUSES = {encoded: status for status in range(17) for encoded in _texts(str(status))}
_STATUS = re.compile(
    b"(?:%b)(%b)"
    % (
        b"|".join(map(re.escape, _texts("grpc-status"))),
        b"|".join(map(re.escape, _STATUSES)),
    ),
)


def _status(block: bytes) -> int:
    """Return the status in a header block; UNKNOWN without one. A full HPACK decoder takes longer
    for one block than a server for the call."""
    found = _STATUS.search(block)
    return UNKNOWN if found is None else _STATUSES[found[1]]
