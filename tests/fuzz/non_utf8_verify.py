"""`non_utf8_parsing.py`: Verify and BatchVerify with secrets that are not text."""

import random
from collections.abc import Iterable

from google.protobuf.message import DecodeError
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_service.access.methods import BATCH_VERIFY, VERIFY
from latchkey_service.rpc.non_utf8_parsing import parse_non_utf8

from tests.fuzz.target import Finding, Target

GOOD = pb.VerifyRequest(secret="fuzz_good", required_scope=pb.SCOPE_READ).SerializeToString()
NOT_TEXT = b"\x0a\x04a\xff\xfeb\x10\x01"
PIECES = (
    GOOD, NOT_TEXT, b"\x0a\x00", b"\x0a", b"\x10\x02", b"\x10\xff\xff\xff\xff\x0f", b"\xff",
    b"\xc3\xa9",
    b"\xed\xa0\x80", b"\x12\x02", b"\x0b\x0c", b"\x1a\x03abc", b"\x0a\x80\x80\x80\x80\x10",
    b"\x0a" + bytes([len(GOOD)]) + GOOD, b"\x0a" + bytes([len(NOT_TEXT)]) + NOT_TEXT,
)  # fmt: skip


class NonUtf8Verify(Target):
    """The first byte selects the method of the message."""

    length_max = 512
    mutates = True

    def seeds(self) -> Iterable[bytes]:
        yield b"\0" + GOOD
        yield b"\0" + NOT_TEXT
        yield b"\1" + b"".join(b"\x0a" + bytes([len(m)]) + m for m in (GOOD, NOT_TEXT, GOOD))

    def mutate(self, data: bytes, length_max: int, chance: random.Random) -> bytes:
        place = chance.randint(1, max(1, len(data)))
        match chance.randrange(4):
            case 0 | 1:
                return data[:place] + chance.choice(PIECES) + data[place:]
            case 2:
                return data[:place] + data[place + chance.randint(1, 4) :]
            case _:
                return bytes([chance.randrange(2)]) + data[1:]

    def one(self, data: bytes) -> None:
        batch, body = data[:1] == b"\1", data[1:]
        path, kind = (BATCH_VERIFY, pb.BatchVerifyRequest) if batch else (VERIFY, pb.VerifyRequest)
        try:
            strict = kind.FromString(body)
        except DecodeError:
            strict = None
        parsed = parse_non_utf8(path, body)
        if parsed is None:
            if strict is not None:
                raise Finding("a valid message is rejected")
            return
        if not isinstance(parsed, kind):
            raise Finding(f"it is a {type(parsed).__name__}")
        kind.FromString(parsed.SerializeToString())
        if strict is not None:
            # Neither parser uses unknown fields.
            strict.DiscardUnknownFields()
            if strict != parsed:
                raise Finding("a valid text is read as a different one")


TARGET = NonUtf8Verify
