"""The encoded answer of a BatchVerify: its size limit, and answers without details.

A token may have 27 kB of labels, networks and permissions, and a caller may ask for the same token
1,000 times. The transports keep an answer until the client has read it, so its size is limited.
Every verdict fits into the limit. What may be left out are details of tokens.
"""

from collections.abc import Sequence
from typing import Final

from latchkey_proto.v1 import token_service_pb2 as pb

__all__ = ["ANSWER_BYTES_MAX", "encode_batch", "varint", "without_details"]

# gRPC's default limit for messages that a client receives.
ANSWER_BYTES_MAX: Final = 4 * 1024 * 1024
# No answer without details is larger: a verdict, and a token with a name of 256 bytes, an account,
# an id, a hint and five times.
SMALL_BYTES_MAX: Final = 1024
_RESPONSES_TAG: Final = b"\x0a"
# The tag, and a length of up to 28 bits.
_FRAME_BYTES_MAX: Final = 5


def encode_batch(responses: Sequence[bytes], *, omit_details: bool = False) -> bytes:
    """Return the encoded BatchVerifyResponse of encoded VerifyResponses.

    It has at most `ANSWER_BYTES_MAX` bytes. If the responses have more, some of the later ones lose
    the details of their tokens. Each loses them only if the rest might not fit otherwise.
    """
    left = ANSWER_BYTES_MAX - len(responses) * _FRAME_BYTES_MAX
    # What the responses need at most without details. Each is replaced by its size, in turn.
    reserved = sum(min(len(response), SMALL_BYTES_MAX) for response in responses)
    encoded: list[bytes] = []
    for full in responses:
        reserved -= min(len(full), SMALL_BYTES_MAX)
        omits = omit_details or len(full) > left - reserved
        response = without_details(full) if omits else full
        left -= len(response)
        encoded += (_RESPONSES_TAG, varint(len(response)), response)
    return b"".join(encoded)


def without_details(encoded: bytes) -> bytes:
    """Return an encoded VerifyResponse without labels, networks and permissions.

    Without a position, no client caches it. Otherwise it could apply the verdict to an address from
    which the token may not be used.
    """
    response = pb.VerifyResponse.FromString(encoded)
    if not response.HasField("token"):
        return encoded
    for field in ("labels", "allowed_networks", "permissions"):
        response.token.ClearField(field)
    response.revision = response.mark = 0
    response.details_omitted = True
    return response.SerializeToString()


def varint(number: int) -> bytes:
    """Return the varint encoding of a number that is not negative, seven bits at a time."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
