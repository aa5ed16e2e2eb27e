"""The load: unary gRPC calls over one HTTP/2 connection, with a fixed number in flight.

A purpose-built client. grpcio's is slower than the servers to be measured, and h2load sends one
body repeatedly and counts gRPC errors as successes. Frames are written and read as bytes, with only
the part of HTTP/2 that a client needs if it knows the answers. Answers are checked by size and
first bytes, and a sample is kept for a thorough check.
"""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.benchmarks.http2 import (
    ACK,
    DATA,
    DATA_FRAME,
    END_HEADERS,
    END_STREAM,
    FRAME,
    HEADERS,
    MAX_CONCURRENT_STREAMS,
    PADDED,
    RST_STREAM,
    SETTINGS,
    SILENCE_SECONDS_MAX,
    Connection,
    LoadError,
    frame,
    header_blocks,
)

__all__ = ["LoadError", "Slice", "run"]

RECEIVE_BYTES = 1 << 18
# One in this many answers is kept. A prime, so as not to fall into step with a server's batches.
SAMPLE_EVERY = 97
SAMPLES_MAX = 500


@dataclass(slots=True)
class Slice:
    """The measurements of one stretch of load. Times in seconds, latencies in nanoseconds,
    ascending."""

    seconds: float
    latencies: list[int]
    failures: int
    # The counts of `meter` over the stretch, and this process's own CPU.
    metered: tuple[float, ...]
    load_cpu: float
    # Pairs of request and answer.
    samples: list[tuple[bytes, bytes]] = field(repr=False)

    @property
    def calls(self) -> int:
        """Return how many calls succeeded."""
        return len(self.latencies)

    def percentile_us(self, share: float) -> float:
        """Return the latency, µs, below which `share` (0 to 1) of the calls lie."""
        return self.latencies[min(self.calls - 1, int(self.calls * share))] / 1_000


def run(
    address: str,
    path: str,
    requests: Iterator[bytes],
    *,
    in_flight: int,
    warm_up_seconds: float,
    seconds: float,
    begins_with: bytes,
    meter: Callable[[], tuple[float, ...]] = lambda: (),
) -> Slice:
    """Call `path` at `address` (HOST:PORT) without a pause and return the measurements.

    `requests` are serialised messages, one for each call; it must not end. An answer counts as a
    failure unless it is one whole message that begins with `begins_with`. Raises LoadError and
    OSError.
    """
    connection = _Connection(address, path)
    # This code creates no cycles, and a collection would count as the server's latency.
    gc.disable()
    try:
        connection.open(in_flight)
        return connection.load(requests, in_flight, warm_up_seconds, seconds, begins_with, meter)
    finally:
        gc.enable()
        connection.close()


class _Connection(Connection):
    """One HTTP/2 connection with calls of one method."""

    def __init__(self, address: str, path: str) -> None:
        super().__init__(address)
        self._first_block, self._block = header_blocks(address, path)
        self._rest = b""

    def open(self, in_flight: int) -> None:
        """Do the handshake. Raises LoadError if the server allows fewer concurrent calls."""
        self._greet()
        got_settings = False
        while not got_settings:
            out: list[bytes] = []
            for kind, flags, stream, payload in self._frames(self._receive()):
                self._control(kind, flags, stream, payload, out)
                got_settings |= kind == SETTINGS and not flags & ACK
            self._socket.sendall(b"".join(out))
        if self._settings.get(MAX_CONCURRENT_STREAMS, in_flight) < in_flight:
            raise LoadError(f"the server allows fewer than {in_flight} calls at once")

    def load(
        self,
        requests: Iterator[bytes],
        in_flight: int,
        warm_up_seconds: float,
        seconds: float,
        begins_with: bytes,
        meter: Callable[[], tuple[float, ...]],
    ) -> Slice:
        # One loop, with few calls and all state in local variables: a call costs about 5 µs here,
        # while the fastest server takes 40.
        clock = time.perf_counter_ns
        sent: dict[int, tuple[int, bytes]] = {}
        answers: dict[int, bytes] = {}
        latencies: list[int] = []
        samples: list[tuple[bytes, bytes]] = []
        failures = 0
        stream = -1
        headers = frame(HEADERS, END_HEADERS, 0, self._block)
        headers_start, headers_end = headers[:5], headers[9:]
        waiting_request: bytes | None = None
        prefix_end = 5 + len(begins_with)
        now = clock()
        begin = now + int(warm_up_seconds * 1e9)
        begun = ended = False
        end = begin
        before: tuple[float, ...] = ()
        after: tuple[float, ...] = ()
        cpu_before = load_cpu = 0.0
        out: list[bytes] = []
        while True:
            if not begun and now >= begin:
                begun = True
                latencies.clear()
                failures = 0
                cpu_before, before, begin = time.process_time(), meter(), clock()
                end = begin + int(seconds * 1e9)
            elif begun and not ended and now >= end:
                ended = True
                after, load_cpu, end = meter(), time.process_time() - cpu_before, now
                counted, failed = len(latencies), failures
            # Pending requests are sent at once, and all of them start at one moment.
            now = clock()
            while not ended and len(sent) < in_flight:
                request = next(requests) if waiting_request is None else waiting_request
                size = len(request) + 5
                if size > self._send_window:
                    waiting_request = request
                    break
                waiting_request = None
                self._send_window -= size
                stream += 2
                if stream == 1:
                    out.append(frame(HEADERS, END_HEADERS, 1, self._first_block))
                else:
                    out += (headers_start, stream.to_bytes(4, "big"), headers_end)
                out.append(
                    DATA_FRAME.pack(
                        size >> 16, size & 0xFFFF, DATA, END_STREAM, stream, 0, size - 5
                    )
                )
                out.append(request)
                sent[stream] = (now, request)
            if out:
                self._socket.sendall(b"".join(out))
                out.clear()
            if not sent:
                break
            buffer = self._receive()
            now = clock()
            position, length = 0, len(buffer)
            while length - position >= 9:
                high, low, kind, flags, number = FRAME.unpack_from(buffer, position)
                start = position + 9
                position = start + (high << 16 | low)
                if position > length:
                    position = start - 9
                    break
                if kind == DATA:
                    if flags & PADDED:
                        raise LoadError("the server pads its answers")
                    self._received += position - start
                    answer = buffer[start:position]
                    answers[number] = answers[number] + answer if number in answers else answer
                elif kind != HEADERS:
                    self._control(kind, flags, number, buffer[start:position], out)
                    if kind != RST_STREAM:
                        continue
                    answers.pop(number, None)
                    flags = END_STREAM
                if flags & END_STREAM:
                    # A failed call ends without a message, with headers only.
                    then, request = sent.pop(number)
                    answer = answers.pop(number, b"")
                    if (
                        answer[5:prefix_end] == begins_with
                        and int.from_bytes(answer[:5], "big") == len(answer) - 5
                    ):
                        latencies.append(now - then)
                        if len(latencies) % SAMPLE_EVERY == 1 and len(samples) < SAMPLES_MAX:
                            samples.append((request, answer[5:]))
                    else:
                        failures += 1
            self._rest = buffer[position:]
            self._give_back(out)
        # Answers after the end are awaited, but not counted.
        return Slice(
            (end - begin) / 1e9,
            sorted(latencies[:counted]),
            failed,
            tuple(b - a for a, b in zip(before, after, strict=True)),
            load_cpu,
            samples,
        )

    def _receive(self) -> bytes:
        """Return the bytes that can be read, after those left over from the last read."""
        try:
            chunk = self._socket.recv(RECEIVE_BYTES)
        except TimeoutError:
            raise LoadError(f"no answer for {SILENCE_SECONDS_MAX:.0f} seconds") from None
        if not chunk:
            raise LoadError("the server closed the connection")
        return self._rest + chunk if self._rest else chunk

    def _frames(self, buffer: bytes) -> Iterator[tuple[int, int, int, bytes]]:
        """Yield type, flags, stream and payload of each whole frame; keep the rest."""
        self._rest = buffer
        while len(self._rest) >= 9:
            high, low, kind, flags, stream = FRAME.unpack_from(self._rest)
            end = 9 + (high << 16 | low)
            if len(self._rest) < end:
                return
            payload, self._rest = self._rest[9:end], self._rest[end:]
            yield kind, flags, stream, payload
