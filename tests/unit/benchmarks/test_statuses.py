"""Statuses read from blocks of headers: RFC 7541, as servers write it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks.statuses import KNOWN_MAX, HeaderError, Statuses

# ":status: 200" and "content-type" of the static table.
OK_200 = b"\x88"
# As Rust's h2 and gRPC's own C core write them.
HUFFMAN_NAME = bytes.fromhex("88 9acac8b21234da8f")
PLAIN_NAME = b"\x0bgrpc-status"
# Neither Huffman's code nor the field: stepped over by their lengths.
names = st.binary(min_size=1, max_size=300).filter(lambda name: name != b"grpc-status")
fields = st.tuples(names, st.binary(max_size=5_000), st.sampled_from([b"\x00", b"\x10", b"\x40"]))


def integer(value: int, bits: int, first: int = 0) -> bytes:
    """RFC 7541 §5.1."""
    most = (1 << bits) - 1
    if value < most:
        return bytes([first | value])
    written, value = bytearray([first | most]), value - most
    while value >= 0x80:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])


def literal(name: bytes, value: bytes, kind: bytes = b"\x00") -> bytes:
    return kind + integer(len(name), 7) + name + integer(len(value), 7) + value


@given(st.integers(0, 16), st.lists(fields, max_size=5), st.lists(fields, max_size=5))
def test_status_is_found_among_any_other_fields(status, before, after):
    """Whatever stands before and after it, and however long, the status is read."""
    ours = literal(b"grpc-status", str(status).encode())
    block = OK_200 + b"".join(literal(*f) for f in before) + ours
    assert Statuses().read(block + b"".join(literal(*f) for f in after)) == status


@given(st.lists(fields, max_size=5))
def test_other_fields_are_no_status(others):
    """Headers at the beginning of an answer have none, even when the bytes are in a value."""
    decoy = literal(b"grpc-message", literal(b"grpc-status", b"8"))
    assert Statuses().read(OK_200 + decoy + b"".join(literal(*f) for f in others)) is None


@pytest.mark.parametrize(
    ("value", "status"),
    [("81 07", 0), ("81 17", 2), ("81 7b", 8), ("82 0b5f", 14), ("82 083f", 10), ("82 0b9f", 16)],
)
def test_huffman_code_is_read(value, status):
    """RFC 7541 appendix B, of numbers with one digit and with two."""
    for kind in (b"\x00", b"\x40"):
        assert Statuses().read(OK_200 + kind + HUFFMAN_NAME + bytes.fromhex(value)) == status


def test_size_of_the_table_may_come_first():
    """A server says with its first block that its table has no entries, RFC 7541 §4.2."""
    assert Statuses().read(b"\x20" + OK_200 + literal(b"grpc-status", b"8")) == 8


@pytest.mark.parametrize(
    "block",
    [
        # An entry of a table; a name from one; a table of 4096 bytes.
        b"\xbe",
        b"\x7e\x01x",
        b"\x3f\xe1\x1f",
        literal(b"grpc-status", b"17"),
        literal(b"grpc-status", b""),
        # Cut off, within a length, a name and a value.
        b"\x00",
        b"\x00\x7f\xff",
        literal(b"x", b"value")[:-1],
        b"\x00" + PLAIN_NAME,
    ],
)
def test_what_cannot_be_read_is_no_guess(block):
    """A block that needs a table, or ends too early, is an error."""
    with pytest.raises(HeaderError):
        Statuses().read(OK_200 + block)


def test_memory_of_blocks_is_bounded():
    """Each refusal has headers of its own; no more are remembered than are of use."""
    statuses = Statuses()
    for number in range(2 * KNOWN_MAX):
        block = literal(b"x-request-id", str(number).encode()) + literal(b"grpc-status", b"8")
        assert statuses.read(block) == 8
        assert statuses.read(block) == 8
    assert len(statuses._known) == KNOWN_MAX
