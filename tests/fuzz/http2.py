"""The listener: garbage, floods, rapid resets and half-open connections, with and without TLS.

The server is a separate process, so that its memory and files can be measured alone. Nothing in it
is instrumented, because most of it is Rust or C; its answers guide the fuzzer. An input is one byte
for the use and end of the connection, then frames.
"""

import collections
import os
import random
import re
import socket
import ssl
import struct
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FunctionType
from typing import Any

import atheris
import grpc
import hpack
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.fuzz import frames
from tests.fuzz.target import Finding, Target
from tests.helpers import raw_http2

# Bits of the byte that says how the connection is used.
NO_PREFACE, RAW, IN_PIECES, ENDING = 0x80, 0x40, 0x20, 0x03
PING_LAST, HALF_CLOSED, RESET, LEFT_OPEN = range(4)
LAST_PING = raw_http2.Frame(raw_http2.PING, 0, 0, b"lastping").encoded()
# The name of an exception, or of a file.
INSIDE = re.compile(r"Traceback|\w(Error|Exception)\b|\.py\b")
CONNECT_SECONDS_MAX = 10.0
# A flooded server may rightly stop reading. Then the rest is not sent.
SEND_SECONDS_MAX = 0.2
ANSWER_SECONDS_MAX = 0.02
CALL_SECONDS_MAX = 15.0
OPEN_MAX = 64
LOOK_EVERY = 100
SETTLE_SECONDS_MAX = 10.0
IDLE_SECONDS = 0.08
# Above the number when only the other client is connected: connections that are just ending.
FILES_SLACK = 12
LANDMARKS = 4_096
# gRPC returns INTERNAL for errors in HTTP/2 or in a message's frame, such as a compression flag
# without the header or a length past the end (grpc/doc/statuscodes.md). Our code is not involved.
UNKNOWN, INTERNAL = "2", "13"
# Requests that grpcio answers with UNKNOWN before it calls our code, which cannot prevent this: a
# method other than POST, and a path that is not UTF-8.
OF_GRPCIO = ("Bad method header", "Unexpected <class 'UnicodeDecodeError'>: 'utf-8' codec")


class Http2(Target):
    """Connections to one address, and a well-behaved second client that must be served."""

    length_max = 16_384
    mutates = True

    def __init__(self, tls: bool) -> None:
        host, _, port = os.environ["FUZZ_ADDRESS"].rpartition(":")
        self._address = (host, int(port))
        self._process = psutil.Process(int(os.environ["FUZZ_PID"]))
        self._tls = None
        channels = [grpc.insecure_channel(os.environ["FUZZ_ADDRESS"])] * 2
        if tls:
            folder = Path(os.environ["FUZZ_TLS"])
            self._tls = ssl.create_default_context(cafile=folder / "ca.pem")
            self._tls.load_cert_chain(folder / "verifier.pem")
            self._tls.set_alpn_protocols(["h2"])
            channels = [_secure(folder, name) for name in ("manager", "verifier")]
        manager, verifier = channels
        token = pb_grpc.TokenServiceStub(manager).Create(
            pb.CreateRequest(
                account_id="acme", name=f"looked at by {os.getpid()}", scope=pb.SCOPE_READ
            ),
            timeout=CALL_SECONDS_MAX,
        )
        self._question = pb.VerifyRequest(secret=token.secret, required_scope=pb.SCOPE_READ)
        self._stub: Any = pb_grpc.TokenServiceStub(verifier)
        self._health: Any = health_pb2_grpc.HealthStub(verifier)
        self._landmarks = _landmarks()
        self._inputs = 0
        self._open: collections.deque[socket.socket] = collections.deque()
        self._look()
        self._files = self._process.num_fds()

    def seeds(self) -> Iterable[bytes]:
        for number, sequence in enumerate(frames.good()):
            for ending in (PING_LAST, number % 4):
                yield bytes([ending]) + b"".join(frame.encoded() for frame in sequence)
        yield bytes([NO_PREFACE | HALF_CLOSED]) + b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
        yield bytes([NO_PREFACE | RAW | HALF_CLOSED]) + b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00"

    def mutate(self, data: bytes, length_max: int, chance: random.Random) -> bytes:
        how = data[0]
        if chance.random() < 0.2:
            how = chance.randrange(4) | chance.choice((0, 0, 0, IN_PIECES, NO_PREFACE, RAW))
        changed = frames.change(frames.split(data[1:]), chance)
        return bytes([how]) + b"".join(frame.encoded() for frame in changed)

    def one(self, data: bytes) -> None:
        how, body = data[0] if data else 0, data[1:]
        try:
            connection = self._connect(raw=bool(how & RAW))
        except ssl.SSLError:
            # Its handshake did not complete in time or was rejected.
            connection = None
        if connection is not None:
            self._attack(connection, how, body)
        self._inputs += 1
        if self._inputs % LOOK_EVERY == 0:
            self._look()

    def processes(self) -> list[psutil.Process]:
        return [self._process]

    def settle(self) -> None:
        """Disconnect, and wait until the server has noticed. Raises Finding if it does not."""
        while self._open:
            self._open.popleft().close()
        give_up = time.monotonic() + SETTLE_SECONDS_MAX
        while (files := self._process.num_fds()) > self._files + FILES_SLACK:
            if time.monotonic() > give_up:
                raise Finding(f"the server has {files} files open, after {self._files} at first")
            time.sleep(0.01)
        # Queued work still takes memory, which is not a leak; the server gets this long to finish
        # it.
        while self._is_busy() and time.monotonic() < give_up:
            pass

    def _is_busy(self) -> bool:
        """Observe the server for a moment; return whether it used more CPU time than its timers
        need.
        """
        before = sum(self._process.cpu_times()[:2])
        time.sleep(IDLE_SECONDS)
        return sum(self._process.cpu_times()[:2]) - before > IDLE_SECONDS / 4

    def _connect(self, *, raw: bool) -> socket.socket:
        plain = socket.socket()
        plain.settimeout(CONNECT_SECONDS_MAX)
        # From many addresses, because one address would run out of ports: each port stays in
        # TIME_WAIT for a minute.
        plain.bind((f"127.0.{self._inputs >> 8 & 0x7F}.{self._inputs & 0xFF or 1}", 0))
        plain.connect(self._address)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls is None or raw:
            return plain
        return self._tls.wrap_socket(plain, server_hostname="127.0.0.1")

    def _attack(self, connection: socket.socket, how: int, body: bytes) -> None:
        ending = how & ENDING
        connection.settimeout(SEND_SECONDS_MAX)
        try:
            if not how & NO_PREFACE:
                connection.sendall(raw_http2.PREFACE)
            sequence = [body] if how & NO_PREFACE else list(frames.expand(frames.split(body)))
            if how & IN_PIECES:
                for piece in sequence[:20]:
                    middle = len(piece) // 2
                    connection.sendall(piece[:middle])
                    connection.sendall(piece[middle:])
                sequence = sequence[20:]
            connection.sendall(b"".join(sequence))
            if ending == PING_LAST:
                connection.sendall(LAST_PING)
            elif ending == HALF_CLOSED:
                # With TLS too, the socket below it is closed, as when a host disappears.
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            # The server has closed the connection or stopped reading: either is right.
            pass
        if ending == LEFT_OPEN:
            self._open.append(connection)
            if len(self._open) > OPEN_MAX:
                self._open.popleft().close()
            return
        try:
            if ending == RESET:
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            else:
                self._read(connection)
        finally:
            connection.close()

    def _read(self, connection: socket.socket) -> None:
        """Read answers until the last ping is answered, the connection ends, or enough was read."""
        connection.settimeout(ANSWER_SECONDS_MAX)
        decoder = hpack.Decoder()
        buffer = b""
        pinged = False
        while not pinged:
            try:
                chunk = connection.recv(1 << 16)
            except OSError:
                return
            if not chunk:
                return
            answers, buffer = raw_http2.received(buffer + chunk)
            for frame in answers:
                pinged |= frame.kind == raw_http2.PING and frame.payload == b"lastping"
                self._judge(frame, decoder)

    def _judge(self, frame: raw_http2.Frame, decoder: hpack.Decoder) -> None:
        told = struct.pack(">BB", frame.kind, frame.flags)
        if frame.kind > raw_http2.CONTINUATION:
            # Not HTTP/2: a TLS alert, or an answer in HTTP/1.
            return
        if frame.kind in (raw_http2.RST_STREAM, raw_http2.GOAWAY):
            told += frame.payload[:8]
        elif frame.kind == raw_http2.HEADERS:
            fields = {
                name.decode("latin-1"): value.decode("latin-1")
                for name, value, *_ in decoder.decode(frame.payload, raw=True)
            }
            code, said = fields.get("grpc-status", ""), fields.get("grpc-message", "")
            if not said.startswith(OF_GRPCIO):
                if code == UNKNOWN or (code == INTERNAL and "Latchkey" in said):
                    raise Finding(f"grpc-status {code}: {said}")
                if INSIDE.search(said):
                    raise Finding(f"internals are exposed: {said}")
            told += f"{fields.get(':status')} {code} {said[:12]}".encode()
        self._landmarks[zlib.crc32(told) % LANDMARKS]()

    def _look(self) -> None:
        """Check that other clients are served."""
        if not self._process.is_running():
            raise Finding("the server's process has ended")
        try:
            health = self._health.Check(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS_MAX)
            answer = self._stub.Verify(self._question, timeout=CALL_SECONDS_MAX)
        except grpc.RpcError as error:
            raise Finding(f"others are not served: {error}") from None
        if health.status != health_pb2.HealthCheckResponse.SERVING:
            raise Finding("the server has stopped serving")
        if answer.verdict != pb.VERDICT_VALID:
            raise Finding("a live token is refused")


def _secure(folder: Path, name: str) -> grpc.Channel:
    pem = (folder / f"{name}.pem").read_bytes()
    credentials = grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes(), pem, pem)
    return grpc.secure_channel(os.environ["FUZZ_ADDRESS"], credentials)


def _landmarks() -> list[Callable[[], None]]:
    """Return functions that do nothing, each a place in the code that libFuzzer counts.

    One is called for each kind of answer, so that libFuzzer looks for new kinds of answers.
    """

    def landmark() -> None:
        return None

    return [
        atheris.instrument_func(FunctionType(landmark.__code__.replace(), {}))
        for _ in range(LANDMARKS)
    ]


TARGET = Http2
