"""The validation of Create."""

import itertools
import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latchkey_service.errors import InvalidArgument
from latchkey_service.secret_format import Keyring, Pepper
from latchkey_service.tokens.management import (
    NewToken,
    Tokens,
)

from tests.helpers.domain import audit_context

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SECRET = Keyring([Pepper(b"other")]).mint("lk", lambda size: bytes(range(size))).secret.reveal()


class Recorder:
    """Replaces the store and records the tokens to insert."""

    def __init__(self):
        self.inserted = []

    async def insert_token(
        self, record, name_key, digest, audit_context, seal, token_seal, request
    ):
        self.inserted.append((record, name_key, digest))
        return True


class Reads:
    """Always has a lease."""

    async def begin(self, deadline):
        return None


def make(now=NOW):
    store = Recorder()
    entropy = iter(range(256))
    return store, Tokens(
        store,  # type: ignore[arg-type]  # all that Create uses of it
        Keyring([Pepper(b"p" * 32)]),
        None,  # type: ignore[arg-type]  # nothing is deleted
        Reads(),  # type: ignore[arg-type]  # all that Create uses of it
        "lk",
        lambda: now,
        lambda size: bytes([next(entropy)]) * size,
    )


def new(**fields: Any) -> NewToken:
    defaults: dict[str, Any] = {
        "account_id": "acme",
        "name": "ci",
        "scope": 1,
        "expire_time": None,
        "ttl": None,
        "labels": {},
    }
    return NewToken(**(defaults | fields))


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("account_id", {"account_id": ""}),
        ("account_id", {"account_id": "a" * 129}),
        ("account_id", {"account_id": "a*"}),
        ("account_id", {"account_id": "acme\n"}),
        ("account_id", {"account_id": "ácme"}),
        ("name", {"name": ""}),
        ("name", {"name": " \t\n "}),
        ("name", {"name": "n" * 65}),
        ("name", {"name": "a\x00b"}),
        ("name", {"name": "a\x1b[31mb"}),
        ("name", {"name": "a\u2028b"}),
        ("scope", {"scope": 0}),
        ("scope", {"scope": 3}),
        ("scope", {"scope": -1}),
        ("expire_time", {"expire_time": NOW}),
        ("expire_time", {"expire_time": NOW - timedelta(days=1)}),
        ("ttl", {"ttl": timedelta(0)}),
        ("ttl", {"ttl": timedelta(seconds=-1)}),
        ("ttl", {"ttl": timedelta(days=3_650_000)}),
        ("ttl", {"ttl": -timedelta(days=3_650_000)}),
        ("labels", {"labels": {str(n): "" for n in range(17)}}),
        ("labels", {"labels": {"": "x"}}),
        ("labels", {"labels": {"k" * 64: "x"}}),
        ('labels["k"]', {"labels": {"k": "v" * 256}}),
        ('labels["k"]', {"labels": {"k": "v\x00"}}),
        ("labels", {"labels": {"k\x07": "v"}}),
        ("expire_time", {"expire_time": datetime.max.replace(tzinfo=UTC)}),
        ("account_id", {"account_id": SECRET}),
        ("name", {"name": SECRET}),
        ("labels", {"labels": {SECRET: "v"}}),
        ("labels", {"labels": {"k": f"my {SECRET}."}}),
    ],
)
async def test_create_names_the_wrong_field(field, bad):
    """An invalid field is named in the violation, and nothing is stored."""
    store, tokens = make()
    with pytest.raises(InvalidArgument) as caught:
        await tokens.create(new(**bad), audit_context(), math.inf)
    assert [v.field for v in caught.value.violations] == [field]
    assert store.inserted == []


async def test_create_names_all_wrong_fields_at_once():
    """A request with several mistakes gets one violation for each."""
    _, tokens = make()
    with pytest.raises(InvalidArgument) as caught:
        await tokens.create(
            new(account_id="", name="", scope=0, ttl=timedelta(0)), audit_context(), math.inf
        )
    assert {v.field for v in caught.value.violations} == {"account_id", "name", "scope", "ttl"}


@pytest.mark.parametrize(
    "fine",
    [
        {"account_id": "A.b_c:d-9" + "x" * 55},
        {"name": "  trimmed  "},
        {"name": "🙂" * 64},
        {"name": "<script>alert(1)</script>"},
        {"name": "\u202emirrored"},
        {"ttl": timedelta(microseconds=1)},
        {"expire_time": datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)},
        {"labels": {"k" * 63: "v" * 255}},
        {"labels": {str(n): "" for n in range(16)}},
    ],
)
async def test_create_accepts_the_limits(fine):
    """Values exactly at the limits are accepted."""
    store, tokens = make()
    created = await tokens.create(new(**fine), audit_context(), math.inf)
    assert store.inserted[0][0] == created.record
    assert created.record.name == fine.get("name", "ci").strip()


async def test_names_that_look_alike_are_equal():
    """Names that differ only in letter case or composed characters are equal."""
    store, tokens = make()
    for name in ("Straße", "STRASSE", "Cafe\u0301", "CAFÉ"):
        await tokens.create(new(name=name), audit_context(), math.inf)
    keys = [key for _, key, _ in store.inserted]
    assert keys[0] == keys[1]
    assert keys[2] == keys[3]
    assert keys[0] != keys[2]


@given(st.lists(st.datetimes(datetime(2001, 1, 1), datetime(2200, 1, 1)), min_size=2, max_size=5))
async def test_ids_are_ordered_by_time(naive):
    """Ids sort by creation time, to the millisecond, and have at most 64 characters."""
    times = sorted(moment.replace(tzinfo=UTC, microsecond=0) for moment in naive)
    made = []
    for moment in times:
        _, tokens = make(moment)
        made.append((moment, (await tokens.create(new(), audit_context(), math.inf)).record.id))
    assert all(a[0] == b[0] or a[1] < b[1] for a, b in itertools.pairwise(made))
    assert all(len(token_id) <= 64 for _, token_id in made)
