"""Counting the fields of encoded messages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_service.rpc.field_count import has_more_fields

REPORT = 5


@given(st.lists(st.text(max_size=200), max_size=30), st.integers(0, 2**63 - 1))
def test_fields_are_counted(hints: list[str], number: int) -> None:
    """The fields of a message count, and those of the submessages that are asked for: no more and
    no fewer, whatever their sizes."""
    message = pb.WatchRequest(number=number, mark=7)
    message.use_report.uses.extend(pb.TokenUse(hint=hint) for hint in hints)
    data = message.SerializeToString()
    outer = sum(1 for _ in message.ListFields())
    for into, count in (((), outer), ((REPORT,), outer + len(hints))):
        assert not has_more_fields(data, into, count)
        assert has_more_fields(data, into, count - 1)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 50,
        b"\x0a",
        b"\x0a\x05x",
        b"\x08",
        b"\x09\x00",
        b"\x2a\x02\x12",
        b"\x0b",
        b"\x0f\x00",
    ],
)
def test_malformed_messages_are_left_to_the_parser(data: bytes) -> None:
    """A message that ends too early, or has too long a number, does not have more fields."""
    assert not has_more_fields(data, (REPORT,), 3)


def test_a_malformed_part_hides_no_other() -> None:
    """Fields before the malformed part count, because the parser reads them too."""
    report = b"\x2a\x06" + b"\x12\x00" * 3
    assert has_more_fields(report + b"\x0a", (REPORT,), 4)


def test_fields_of_groups_count() -> None:
    """No message of ours has groups, but the parser reads those that it does not know."""
    group = b"\x13" + b"\x08\x00" * 3 + b"\x14"
    assert not has_more_fields(group, (), 5)
    assert has_more_fields(group, (), 4)
