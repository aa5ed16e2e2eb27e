"""gRPC's status of a call from the headers that it ended with, without decoding the others.

Failed calls carry a request id of their own, so no two blocks of headers are alike, and a full
HPACK decoder takes longer for one than a server for the call. The loads ask for a table of no
entries (RFC 7541 §4.2), which makes each block readable by itself: fields are stepped over by
their lengths, and one is looked at.
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
# The blocks of calls that succeed, and of a connection's first call, are few; these are enough.
KNOWN_MAX = 256
STATIC_ENTRIES = 61
# RFC 7541 appendix B: how a digit is written, in bits; and the name, as it stands in a block.
_DIGITS = ("00000", "00001", "00010", *(f"{n:06b}" for n in range(0b011001, 0b100000)))
_NAMES = (b"grpc-status", bytes.fromhex("9acac8b21234da8f"))


class HeaderError(Exception):
    """A block of headers is not as it should be."""


class Statuses:
    """Reads blocks. It knows those that it has seen, while they are few."""

    def __init__(self) -> None:
        self._known: dict[bytes, int | None] = {}

    def read(self, block: bytes) -> int | None:
        """Return the status in a block of headers, None if it has none. Raises HeaderError."""
        try:
            return self._known[block]
        except KeyError:
            status = _read(block)
            if len(self._known) < KNOWN_MAX:
                self._known[block] = status
            return status


def _read(block: bytes) -> int | None:
    """RFC 7541 §6. The field is never in a table: it is not among the static ones, and there are
    no others."""
    position, found = 0, None
    try:
        while position < len(block):
            first = block[position]
            if first & 0xE0 == 0x20:
                # A new size of the table.
                size, position = _integer(block, position, 5)
                if size:
                    raise HeaderError("the server keeps a table though told not to")
                continue
            # Indexed; literal that would be kept; literal that is not.
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
    """RFC 7541 §5.2: filled up with ones."""
    bits = "".join(_DIGITS[int(digit)] for digit in digits)
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


# What the value may be: as it is, and by Huffman's code.
_VALUES = (
    {str(status).encode(): status for status in range(17)},
    {_huffman(str(status)): status for status in range(17)},
)
