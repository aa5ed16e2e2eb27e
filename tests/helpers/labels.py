"""Encoded Creates with any number of labels, which use less memory than messages."""

import itertools
import string

from latchkey_proto.v1 import token_service_pb2 as pb

__all__ = ["create_with_labels"]


def create_with_labels(count: int) -> bytes:
    """Return an encoded Create with `count` empty labels: 8 bytes each, all with other keys."""
    head = pb.CreateRequest(account_id="acme", name="many", scope=pb.SCOPE_READ)
    number = pb.CreateRequest.DESCRIPTOR.fields_by_name["labels"].number
    keys = itertools.product(string.ascii_letters.encode(), repeat=4)
    start = bytes([number << 3 | 2, 6, 0x0A, 4])
    return head.SerializeToString() + b"".join(
        start + bytes(key) for key in itertools.islice(keys, count)
    )
