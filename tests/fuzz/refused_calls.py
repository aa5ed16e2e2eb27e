"""Calls without a credential: unknown methods, health, and raw bytes before identity.

The server is a separate process with a policy. An input is a list of calls on one connection, each
of six bytes: the method, the size of the message in two, how the call is sent, how often, and the
byte that fills the message. None may get an answer, or be refused for what is in its message, and
the worker keeps nothing of them.
"""

import os
import socket
import ssl
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import hpack
import psutil

from tests.fuzz.target import Finding, Target
from tests.helpers import raw_http2 as http2

TOKENS = "/latchkey.v1.TokenService/"
# The methods that need an identity come first.
NEED_IDENTITY = (
    *(TOKENS + name for name in ("Verify", "BatchVerify", "Create", "Get", "Delete", "Watch")),
    "/latchkey.v1.StatusService/GetStatus",
)
OTHERS = (
    *("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"),
    *("/no.Such/Method", TOKENS + "Verify/", "/", "/" + "x" * 500),
)
PATHS = NEED_IDENTITY + OTHERS
# Bits of the byte that says how a call is sent.
UNENDED, RESET, CREDENTIAL = 0x01, 0x02, 0x04
CONNECT_SECONDS_MAX = 10.0
ANSWER_SECONDS_MAX = 0.1
CALLS_MAX = 100
FRAME_BYTES = 16_384
LOOK_EVERY = 50
SETTLE_SECONDS = 0.1
# gRPC statuses that say nothing about the message.
REFUSALS = {"4", "8", "12", "14", "16"}


class RefusedCalls(Target):
    """Connections without a credential to one address, with TLS or without."""

    length_max = 96

    def __init__(self, tls: bool) -> None:
        host, _, port = os.environ["FUZZ_ADDRESS"].rpartition(":")
        self._address = (host, int(port))
        self._process = psutil.Process(int(os.environ["FUZZ_PID"]))
        self._tls = None
        if tls:
            folder = Path(os.environ["FUZZ_TLS"])
            self._tls = ssl.create_default_context(cafile=folder / "ca.pem")
            self._tls.set_alpn_protocols(["h2"])
        self._inputs = 0
        self._look()

    def seeds(self) -> Iterable[bytes]:
        for number in range(len(PATHS)):
            yield bytes([number, 0, 0, 0, 1, 0])
            yield bytes([number, 0xFF, 0xFF, 0, 3, 0x0A])
            yield bytes([number, 0x10, 0, UNENDED, 99, 0])
        yield bytes([0, 1, 0, RESET, 99, 1, 1, 1, 0, CREDENTIAL, 20, 2])

    def processes(self) -> list[psutil.Process]:
        return [self._process]

    def settle(self) -> None:
        time.sleep(SETTLE_SECONDS)

    def one(self, data: bytes) -> None:
        with self._connect() as own:
            window, buffer = _greeted(own)
            streams: dict[int, str] = {}
            sent = bytearray()
            for block, path, whole, how in _calls(data):
                stream = 2 * len(streams) + 1
                streams[stream] = path
                sent += http2.Frame(http2.HEADERS, http2.END_HEADERS, stream, block).encoded()
                message = whole[: max(0, window)]
                window -= len(message)
                for start in range(0, max(1, len(message)), FRAME_BYTES):
                    piece = message[start : start + FRAME_BYTES]
                    # A message that the window cuts short must not end: that is another fault.
                    ends = not how & UNENDED and len(message) == len(whole)
                    last = start + FRAME_BYTES >= len(message) and ends
                    flags = http2.END_STREAM if last else 0
                    sent += http2.Frame(http2.DATA, flags, stream, piece).encoded()
                if how & RESET:
                    reason = struct.pack(">I", http2.CANCEL)
                    sent += http2.Frame(http2.RST_STREAM, 0, stream, reason).encoded()
            try:
                own.sendall(sent)
                self._judge(own, buffer, streams)
            except OSError:
                # It may disconnect such a client.
                pass
        self._inputs += 1
        if self._inputs % LOOK_EVERY == 0:
            self._look()

    def _connect(self) -> socket.socket:
        own = socket.create_connection(self._address, CONNECT_SECONDS_MAX)
        if self._tls is not None:
            own = self._tls.wrap_socket(own, server_hostname="localhost")
        own.settimeout(CONNECT_SECONDS_MAX)
        own.sendall(http2.PREFACE + http2.Frame(http2.SETTINGS, 0, 0).encoded())
        return own

    def _judge(self, own: socket.socket, buffer: bytes, streams: dict[int, str]) -> None:
        decoder, give_up = hpack.Decoder(), time.monotonic() + ANSWER_SECONDS_MAX
        while (left := give_up - time.monotonic()) > 0:
            own.settimeout(left)
            received = own.recv(1 << 16)
            if not received:
                return
            frames, buffer = http2.received(buffer + received)
            for frame in frames:
                path = streams.get(frame.stream, "")
                if frame.kind == http2.HEADERS:
                    fields: dict[Any, Any] = dict(decoder.decode(frame.payload))
                    status = fields.get("grpc-status", "16")
                    if path in NEED_IDENTITY and status not in REFUSALS:
                        raise Finding(f"{path}: status {status} for a call without identity")
                elif frame.kind == http2.DATA and frame.payload and path in NEED_IDENTITY:
                    raise Finding(f"{path}: an answer to a call without identity")

    def _look(self) -> None:
        """Check that the worker lives, and that others are served."""
        if not self._process.is_running():
            raise Finding("the worker has ended")
        with self._connect() as own:
            _, buffer = _greeted(own)
            own.sendall(
                http2.Frame(http2.HEADERS, http2.END_HEADERS, 1, http2.headers(OTHERS[0])).encoded()
                + http2.Frame(http2.DATA, http2.END_STREAM, 1, http2.message(b"")).encoded()
            )
            give_up = time.monotonic() + CONNECT_SECONDS_MAX
            while time.monotonic() < give_up:
                frames, buffer = http2.received(buffer + own.recv(1 << 16))
                if any(frame.kind == http2.DATA and frame.stream == 1 for frame in frames):
                    return
        raise Finding("health is not served")


def _greeted(own: socket.socket) -> tuple[int, bytes]:
    """Wait for the server's settings. Return the connection's window, and what came after."""
    window, buffer, give_up = http2.WINDOW_DEFAULT, b"", time.monotonic() + CONNECT_SECONDS_MAX
    while time.monotonic() < give_up:
        received = own.recv(1 << 16)
        if not received:
            raise Finding("a new connection was closed")
        frames, buffer = http2.received(buffer + received)
        for frame in frames:
            if frame.kind == http2.WINDOW_UPDATE and frame.stream == 0:
                window += struct.unpack(">I", frame.payload)[0] & http2.WINDOW_MAX
        if any(frame.kind == http2.SETTINGS for frame in frames):
            own.sendall(http2.Frame(http2.SETTINGS, http2.ACK, 0).encoded())
            return window, buffer
    raise Finding("no settings came")


def _calls(data: bytes) -> Iterator[tuple[bytes, str, bytes, int]]:
    """Yield each call of an input: its headers, path and message, and how it is sent."""
    count = 0
    for start in range(0, len(data) - 5, 6):
        number, high, low, how, times, filling = data[start : start + 6]
        path = PATHS[number % len(PATHS)]
        more = [("authorization", f"Bearer lkc_{'x' * 50}")] if how & CREDENTIAL else []
        message = http2.message(bytes([filling]) * (high << 8 | low))
        for _ in range(times % CALLS_MAX + 1):
            if count == CALLS_MAX:
                return
            count += 1
            yield http2.headers(path, *more), path, message, how


TARGET = RefusedCalls
