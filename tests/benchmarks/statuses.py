"""gRPC's status of a call from its final headers, without decoding the other fields.

Each failed call carries a unique request ID, so no two header blocks are alike, and a full HPACK
decoder takes longer for one block than a server for the call. The loads request a table without
entries (RFC 7541 §4.2), which makes each block readable by itself: fields are skipped by their
lengths, and only one is read.
"""

__all__ = [
    "DEADLINE_EXCEEDED",
    "OK",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "HeaderError",
    "Statuses",
]

OK, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNAVAILABLE = 0, 4, 8, 14
# The blocks of successful calls, and of a connection's first call, are few; these are enough.
KNOWN_MAX = 256
STATIC_ENTRIES = 61
# RFC 7541 appendix B: the bits of a digit; and the name, as it is encoded in a block.
_DIGITS = ("00000", "00001", "00010", *(f"{n:06b}" for n in range(0b011001, 0b100000)))
_NAMES = (b"grpc-status", bytes.fromhex("9acac8b21234da8f"))


class HeaderError(Exception):
    """A header block is invalid."""


class Statuses:
    """Reads header blocks. It remembers the ones that it has seen, while they are few."""

    def __init__(self) -> None:
        self._known: dict[bytes, int | None] = {}

    def read(self, block: bytes) -> int | None:
        """Return the status in a header block, None if it has none. Raises HeaderError."""
        try:
            return self._known[block]
        except KeyError:
            status = _read(block)
            if len(self._known) < KNOWN_MAX:
                self._known[block] = status
            return status


def _read(block: bytes) -> int | None:
    """Read a block, RFC 7541 §6. The field is never in a table: it is not among the static entries,
    and there are no others."""
    position, found = 0, None
    try:
        while position < len(block):
            first = block[position]
            if first & 0xE0 == 0x20:
                # A new size of the table.
                size, position = _integer(block, position, 5)
                if size:
                    raise HeaderError("the server keeps a table although the client disabled it")
                continue
            # Indexed; literal with indexing; literal without.
            bits = 7 if first & 0x80 else 6 if first & 0x40 else 4
            index, position = _integer(block, position, bits)
            if index > STATIC_ENTRIES:
                raise HeaderError("the server names an entry of a table that it should not have")
            if first & 0x80:
                continue
            name = b""
            if not index:
                start = position
                size, position = _integer(block, position, 7)
                name = block[position : position + size]
                position += size
                named = name == _NAMES[block[start] >> 7]
            else:
                named = False
            huffman = block[position] >> 7
            size, position = _integer(block, position, 7)
            if named:
                found = _VALUES[huffman].get(block[position : position + size])
                if found is None:
                    raise HeaderError("grpc-status is no number from 0 to 16")
            position += size
    except IndexError:
        position = -1
    if position != len(block):
        raise HeaderError("a block of headers ends in the middle of a field")
    return found


def _integer(block: bytes, position: int, bits: int) -> tuple[int, int]:
    """Return the number that begins in the last `bits` of a byte, and where it ends. RFC 7541
    §5.1."""
    most = (1 << bits) - 1
    value = block[position] & most
    position += 1
    if value < most:
        return value, position
    shift = 0
    while True:
        byte = block[position]
        position += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _huffman(digits: str) -> bytes:
    """Encode a value, RFC 7541 §5.2, padded with ones."""
    bits = "".join(_DIGITS[int(digit)] for digit in digits)
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


# The possible values, plain and Huffman-coded.
_VALUES = (
    {str(status).encode(): status for status in range(17)},
    {_huffman(str(status)): status for status in range(17)},
)
