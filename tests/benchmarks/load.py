"""The load: unary gRPC calls over one HTTP/2 connection, as many in flight as told.

A client of its own and not grpcio's, which is slower than the servers that it would measure, nor
h2load, which sends one body over and over and takes gRPC errors for successes. Frames are written
and read as bytes: what HTTP/2 needs of a client that knows what it will be answered, and no more.
Answers are looked at by size and first bytes, and a sample of them is kept for a thorough look.
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
# Every so many answers one is kept. A prime, so as not to fall in step with a server's batches.
SAMPLE_EVERY = 97
SAMPLES_MAX = 500


@dataclass(slots=True)
class Slice:
    """What one stretch of load measured. Times in seconds, latencies in nanoseconds, ascending."""

    seconds: float
    latencies: list[int]
    failures: int
    # What `meter` counted from the beginning to the end of the stretch, and this process's own CPU.
    metered: tuple[float, ...]
    load_cpu: float
    # Pairs of request and answer.
    samples: list[tuple[bytes, bytes]] = field(repr=False)

    @property
    def calls(self) -> int:
        """How many calls succeeded."""
        return len(self.latencies)

    def percentile_us(self, share: float) -> float:
        """Return the latency, µs, that `share` (0 to 1) of the calls stayed within."""
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
    """Call `path` at `address` (HOST:PORT) without a pause and return what it took.

    `requests` are serialised messages, one for each call; it must not end. An answer counts as a
    failure unless it is one whole message that begins with `begins_with`. Raises LoadError and
    OSError.
    """
    connection = _Connection(address, path)
    # Nothing here makes cycles, and a collection would count as the server's latency.
    gc.disable()
    try:
        connection.open(in_flight)
        return connection.load(requests, in_flight, warm_up_seconds, seconds, begins_with, meter)
    finally:
        gc.enable()
        connection.close()


class _Connection(Connection):
    """One HTTP/2 connection with calls of one method on it."""

    def __init__(self, address: str, path: str) -> None:
        super().__init__(address)
        self._first_block, self._block = header_blocks(address, path)
        self._rest = b""

    def open(self, in_flight: int) -> None:
        """Shake hands. Raises LoadError if the server allows fewer calls at once."""
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
        # One loop, with few calls and everything in local variables: a call costs some 5 µs here,
        # while the fastest of the servers takes 40.
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
            # What is to be sent goes out at once, and all of it began at one moment.
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
                    # A failed call ends without a message, by headers alone.
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
        # What was answered after the end was only waited for.
        return Slice(
            (end - begin) / 1e9,
            sorted(latencies[:counted]),
            failed,
            tuple(b - a for a, b in zip(before, after, strict=True)),
            load_cpu,
            samples,
        )

    def _receive(self) -> bytes:
        """Return what is there to be read, with what was left of the time before."""
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
