"""Invalid and hostile HTTP/2 frames: generated, mutated, and expanded. RFC 9113 §6, RFC 7541."""

import gzip
import random
import struct
from collections.abc import Callable, Iterator

from latchkey_proto.v1 import token_service_pb2 as pb

from tests.helpers.raw_http2 import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEAD,
    HEADERS,
    PING,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Frame,
    headers,
    message,
)

__all__ = ["change", "expand", "good", "split"]

# Our own frame type, which is never sent: it repeats the frames before it. Payload: the number of
# frames (1 byte), the repetitions (2), and the increment of their stream numbers (1).
REPEAT = 0xF0
EXPANDED_BYTES_MAX = 1 << 20
_SETTINGS = ((1, 0), (1, 2**32 - 1), (2, 1), (3, 0), (4, 0), (4, 2**31), (4, 1), (5, 16_383),
(5, 2**24),
             (6, 0), (6, 2**31), (8, 1), (0xFFFF, 7))  # fmt: skip
VERIFY = "/latchkey.v1.TokenService/Verify"
PATHS = (
    VERIFY, "/latchkey.v1.TokenService/BatchVerify", "/latchkey.v1.TokenService/Watch",
    "/latchkey.v1.TokenService/Create", "/latchkey.v1.TokenService/List",
    "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch",
    "/latchkey.v1.StatusService/GetStatus",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/latchkey.v1.TokenService/Nope",
    "/", "", "*", "//", "/latchkey.v1.TokenService/Verify/", "/\xff", "/" + "x" * 2_000,
    "http://h/a",
    # Last, because inputs of the corpus contain the numbers of these paths.
    "/latchkey.v1.MaintenanceService/InvalidateAll",
)  # fmt: skip
ODD_HEADERS = (
    ("grpc-timeout", "1n"),
    ("grpc-timeout", "0S"),
    ("grpc-timeout", "99999999H"),
    ("grpc-timeout", "-1S"),
    ("grpc-timeout", "1e9S"),
    ("grpc-timeout", "x"),
    ("grpc-timeout", "999999999999S"),
    ("grpc-timeout", "3S"),
    ("grpc-encoding", "gzip"),
    ("grpc-encoding", "identity"),
    ("grpc-encoding", "snappy"),
    ("grpc-accept-encoding", "gzip,\xff"),
    ("content-type", "text/html"),
    ("content-type", "application/grpc+json"),
    ("content-length", "5"),
    ("content-length", "-1"),
    ("te", "gzip"),
    ("connection", "close"),
    ("transfer-encoding", "chunked"),
    ("upgrade", "h2c"),
    ("expect", "100-continue"),
    ("Upper", "case"),
    (":path", "/again"),
    (":status", "200"),
    (":nope", "x"),
    (":method", "GET"),
    (":authority", "\0"),
    ("authorization", "Bearer lkc_x"),
    ("authorization", "\xff\xfe"),
    ("authorization-bin", "!!!"),
    ("x-bin", "AAAA,====,\xff"),
    ("x-bin", ""),
    ("x-request-id", "\xff"),
    ("x-request-id", "a" * 5_000),
    ("x-forwarded-client-cert", 'By="'),
    ("user-agent", "x" * 9_000),
    ("", "empty"),
    ("a b", "space"),
    ("x-nul", "a\0b"),
    ("x-line", "a\r\nb: c"),
    ("cookie", "a=b; c=d"),
    ("host", "other"),
    ("grpc-status", "0"),
    ("grpc-message", "%"),
    ("grpc-status-details-bin", "AA"),
    ("grpc-tags-bin", "AA"),
    ("grpc-trace-bin", "x"),
)


def split(body: bytes) -> list[Frame]:
    """Return the frames of an input; the last one may claim to be longer than it is."""
    frames = []
    while len(body) >= 9:
        high, low, kind, flags, stream = HEAD.unpack_from(body)
        length = high << 16 | low
        payload, body = body[9 : 9 + length], body[9 + length :]
        frames.append(
            Frame(kind, flags, stream, payload, None if len(payload) == length else length)
        )
    return frames


def expand(frames: list[Frame]) -> Iterator[bytes]:
    """Yield the bytes to send for the frames of an input, at most a megabyte."""
    sent = 0
    for place, frame in enumerate(frames):
        if frame.kind != REPEAT:
            yield (encoded := frame.encoded())
            sent += len(encoded)
            continue
        back, count, step = struct.unpack(">BHB", frame.payload.ljust(4, b"\1")[:4])
        again = [f for f in frames[max(0, place - back) : place] if f.kind != REPEAT]
        for time in range(1, count + 1):
            burst = b"".join(
                f._replace(stream=(f.stream + time * step) % 2**32 if f.stream else 0).encoded()
                for f in again
            )
            sent += len(burst)
            if not burst or sent > EXPANDED_BYTES_MAX:
                return
            yield burst


def good() -> list[list[Frame]]:
    """Return sequences of frames, each either valid or a known attack."""
    settings = Frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 2**20))
    ack = Frame(SETTINGS, ACK, 0, b"")
    call = [
        Frame(HEADERS, END_HEADERS, 1, headers(VERIFY)),
        Frame(DATA, END_STREAM, 1, message(b"")),
    ]
    open_call, reset = call[0], Frame(RST_STREAM, 0, 1, struct.pack(">I", 8))
    block = headers(VERIFY)

    def many(back: int, count: int, step: int = 2) -> Frame:
        return Frame(REPEAT, 0, 0, struct.pack(">BHB", back, count, step))

    return [
        [settings, ack, *call, Frame(GOAWAY, 0, 0, bytes(8))],
        [settings, *call, many(2, 50)],
        # Rapid resets (CVE-2023-44487), with and without a message.
        [settings, open_call, reset, many(2, 1_000)],
        [settings, *call, reset, many(3, 300)],
        # CONTINUATION flood (CVE-2024-24549 and others).
        [
            settings,
            Frame(HEADERS, 0, 1, block),
            Frame(CONTINUATION, 0, 1, b"\x88" * 50),
            many(1, 500, 0),
        ],
        [settings, Frame(HEADERS, 0, 1, b""), Frame(CONTINUATION, 0, 1, b""), many(1, 2_000, 0)],
        # PING, SETTINGS, empty DATA and PRIORITY floods (CVE-2019-9512, 9515, 9518, 9513).
        [settings, Frame(PING, 0, 0, bytes(8)), many(1, 2_000)],
        [settings, many(1, 2_000)],
        [settings, open_call, Frame(DATA, 0, 1, b""), many(1, 2_000, 0)],
        [settings, Frame(PRIORITY, 0, 1, b"\0\0\0\0\x10"), many(1, 2_000)],
        # Windows: overflowing, and closed while answers wait (CVE-2019-9517).
        [settings, Frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**31 - 1)), many(1, 3)],
        [Frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0)), *call, many(2, 100)],
        # Streams that are opened and abandoned.
        [settings, open_call, many(1, 500)],
        [settings, Frame(HEADERS, END_HEADERS, 1, block), Frame(DATA, 0, 1, message(b"")[:3])],
        [settings, Frame(DATA, 0, 1, bytes(100), 10_000)],
    ]


def change(frames: list[Frame], chance: random.Random) -> list[Frame]:
    """Return frames with one to three mutations."""
    frames = list(frames)
    for _ in range(chance.randint(1, 3)):
        place = chance.randint(0, len(frames))
        if not frames or chance.random() < 0.4:
            frames[place:place] = _made(chance)
            continue
        place = place % len(frames)
        frame = frames[place]
        match chance.randrange(9):
            case 0:
                del frames[place]
            case 1:
                frames.insert(place, chance.choice(frames))
            case 2:
                other = chance.randrange(len(frames))
                frames[place], frames[other] = frames[other], frame
            case 3:
                frames[place] = frame._replace(kind=chance.randrange(12))
            case 4:
                frames[place] = frame._replace(flags=frame.flags ^ 1 << chance.randrange(8))
            case 5:
                streams = (0, 1, 2, 3, 5, frame.stream + 2, 2**31 - 1, 2**31 + 1)
                frames[place] = frame._replace(stream=chance.choice(streams) % 2**32)
            case 6:
                length = chance.choice((0, 1, 8, len(frame.payload) + 1, 16_384, 16_385, 2**24 - 1))
                frames[place] = frame._replace(length=length)
            case 7:
                cut = chance.randint(0, len(frame.payload))
                frames[place] = frame._replace(
                    payload=frame.payload[:cut] + chance.randbytes(chance.randrange(9))
                )
            case _ if frame.payload:
                payload = bytearray(frame.payload)
                payload[chance.randrange(len(payload))] = chance.randrange(256)
                frames[place] = frame._replace(payload=bytes(payload))
    return frames


def _made(chance: random.Random) -> list[Frame]:
    """Return some new frames."""
    stream = chance.choice((1, 3, 5, 7))
    makers: list[Callable[[], list[Frame]]] = [
        lambda: _call(stream, chance),
        lambda: _call(stream, chance),
        lambda: [Frame(HEADERS, chance.choice((0, 1, 4, 5, 8, 0x25)), stream, _block(chance))],
        lambda: [
            Frame(CONTINUATION, chance.choice((0, END_HEADERS)), stream, chance.randbytes(20))
        ],
        lambda: [Frame(SETTINGS, chance.choice((0, ACK)), 0, _settings(chance))],
        lambda: [Frame(PING, chance.choice((0, ACK)), 0, chance.randbytes(chance.choice((8, 7))))],
        lambda: [Frame(RST_STREAM, 0, stream, struct.pack(">I", chance.randrange(15)))],
        lambda: [
            Frame(WINDOW_UPDATE, 0, chance.choice((0, stream)), struct.pack(">I", number))
            for number in (chance.choice((0, 1, 65_535, 2**31 - 1, 2**32 - 1)),)
        ],
        lambda: [Frame(GOAWAY, 0, 0, struct.pack(">II", stream, chance.randrange(15)) + b"bye")],
        lambda: [Frame(PRIORITY, 0, stream, struct.pack(">IB", stream, 3))],
        lambda: [Frame(PUSH_PROMISE, END_HEADERS, stream, struct.pack(">I", 2) + headers(VERIFY))],
        lambda: [Frame(chance.randrange(10, 256), 0, stream, chance.randbytes(5))],
        lambda: [
            Frame(
                REPEAT,
                0,
                0,
                struct.pack(
                    ">BHB",
                    chance.randint(1, 4),
                    chance.choice((2, 20, 300, 2_000)),
                    chance.choice((0, 1, 2, 2, 2)),
                ),
            )
        ],
    ]
    return chance.choice(makers)()


def _call(stream: int, chance: random.Random) -> list[Frame]:
    """Return a call of any method, with unusual headers, messages and endings."""
    odd = chance.sample(ODD_HEADERS, chance.randrange(3))
    block = headers(chance.choice(PATHS), *odd, huffman=chance.random() < 0.5)
    data = chance.choice(
        (
            b"",
            b"\xff\xff",
            pb.VerifyRequest(secret="x").SerializeToString(),
            pb.CreateRequest(account_id="acme", name="a", scope=pb.SCOPE_READ).SerializeToString(),
            pb.WatchRequest(number=1).SerializeToString(),
            b"\x0a\x01a" * 3_000,
        )
    )
    bodies = (
        message(data),
        message(data, 1),
        # Deliberately small: `native` decompresses every message that it receives (SECURITY.md).
        message(gzip.compress(data), 1),
        message(data, 2),
        message(data) * 2,
        message(data)[:-1],
        struct.pack(">BI", 0, 2**32 - 1) + data,
        struct.pack(">BI", 0, 6 * 2**20) + data,
    )
    return [
        Frame(HEADERS, END_HEADERS, stream, block),
        Frame(DATA, chance.choice((0, END_STREAM, END_STREAM)), stream, chance.choice(bodies)),
    ]


def _block(chance: random.Random) -> bytes:
    """Return a header block that is damaged or harmful at the level of HPACK."""
    return chance.choice(
        (
            chance.randbytes(chance.randrange(40)),
            headers(VERIFY)[: chance.randrange(30)],
            # Size updates, out-of-range indices, unterminated lengths, and a bomb of references.
            b"\x3f\xe1\xff\xff\xff\x0f" + headers(VERIFY),
            b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
            b"\x40\x7f\xff\xff\xff\xff\x0f",
            b"\x40\x01a\x7f\xa1\x1e" + b"v" * 4_000 + b"\xbe" * 2_000,
            headers(VERIFY, *chance.sample(ODD_HEADERS, 6)),
            headers(VERIFY, *[(f"x-{n}", "y" * 20) for n in range(300)]),
        )
    )


def _settings(chance: random.Random) -> bytes:
    packed = b"".join(struct.pack(">HI", *chance.choice(_SETTINGS)) for _ in range(3))
    return packed[: chance.choice((6, 12, 18, 5))]
