"""Page tokens: the position that they encode, and what is rejected."""

import base64
import re
import string
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latchkey_service.errors import InvalidArgument
from latchkey_service.tokens.page_tokens import decode, encode

IDS = re.compile(r"tok_[0-9a-z]{26}")
accounts = st.text(string.ascii_letters + string.digits + "._:-", min_size=1, max_size=64)
moments = st.datetimes(datetime(2000, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))
positions = st.tuples(moments, st.from_regex(IDS, fullmatch=True))


@given(accounts, positions)
def test_round_trip(account: str, position: tuple[datetime, str]) -> None:
    """Decoding a page token returns the position that was encoded."""
    assert decode(account, encode(account, *position), IDS) == position


@given(accounts, accounts, positions)
def test_bound_to_its_list(account: str, other: str, position: tuple[datetime, str]) -> None:
    """A page token of another list is rejected, however similar the account ids."""
    if account != other:
        with pytest.raises(InvalidArgument, match="page_token"):
            decode(other, encode(account, *position), IDS)


@given(accounts, positions, st.data())
def test_damaged(account: str, position: tuple[datetime, str], data: st.DataObject) -> None:
    """A changed, shortened or lengthened page token raises InvalidArgument."""
    token = encode(account, *position)
    place = data.draw(st.integers(0, len(token) - 1))
    character = data.draw(st.characters(codec="utf-8"))
    changed = token[:place] + character + token[place + 1 :]
    for damaged in (changed, token[:place], token + character):
        if damaged != token:
            with pytest.raises(InvalidArgument, match="page_token"):
                decode(account, damaged, IDS)


@given(accounts, st.text(max_size=300) | st.binary(max_size=200))
def test_made_up(account: str, made_up: str | bytes) -> None:
    """For any text, base64 or not, the decoder raises no exception but InvalidArgument."""
    if isinstance(made_up, bytes):
        made_up = base64.urlsafe_b64encode(made_up).decode().rstrip("=")
    with pytest.raises(InvalidArgument, match="page_token"):
        decode(account, made_up, IDS)


@pytest.mark.parametrize("identifier", ["a\x00b", "tok_" + "x" * 27, "", "7"])
def test_wrong_id(identifier: str) -> None:
    """A page token with a valid seal and an id of another kind is rejected."""
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    with pytest.raises(InvalidArgument, match="page_token"):
        decode("acme", encode("acme", moment, identifier), IDS)
