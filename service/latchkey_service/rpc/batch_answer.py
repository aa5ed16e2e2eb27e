"""The encoded answer of a BatchVerify: its size limit, answers without details, its verdicts.

A token may have 27 kB of labels, networks and permissions, and a caller may ask for the same token
1,000 times. The transports keep an answer until the client has read it, so its size is limited.
Every verdict fits into the limit. What may be left out are details of tokens.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Final

from latchkey_proto.v1 import token_service_pb2 as pb

from latchkey_service.tokens.verdict import Verdict

__all__ = ["ANSWER_BYTES_MAX", "encode_batch", "varint", "verdict_counts", "without_details"]

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


def verdict_counts(responses: Sequence[bytes]) -> dict[str, int]:
    """Return how many of the encoded VerifyResponses have each verdict, as attributes of a span.

    There are at most as many attributes as verdicts, however large the batch is.
    """
    # The tag of the verdict comes first, and then its value.
    counts = Counter(response[1] for response in responses)
    return {f"latchkey.verdicts.{Verdict(v).name.lower()}": n for v, n in counts.items()}


def varint(number: int) -> bytes:
    """Return the varint encoding of a number that is not negative, seven bits at a time."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
