"""What an Update makes of a token, and which changes narrow it. Pure."""

import ipaddress
import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latchkey_coherence.rate import RateLimit
from latchkey_coherence.verdict import Networks, Verdict, decide
from latchkey_service.tokens.changes import (
    NewValues,
    decides_alike,
    narrows,
    updated,
    values_violations,
)
from latchkey_service.tokens.validation import canonical_network, networks_in
from latchkey_service.tokens.verdict import CachedToken, Scope, TokenRecord

NOW = datetime(2026, 1, 1, tzinfo=UTC)
PERMISSIONS = ("orders:read", "orders:write", "orders:*", "users:read", "users:*")
NETWORKS = ("10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32", "0.0.0.0/0", "::/0", "2001:db8::/32")
ADDRESSES = ("", "10.1.2.3", "10.9.9.9", "192.0.2.1", "2001:db8::1", "::1")
values = st.fixed_dictionaries(
    {
        "scope": st.sampled_from([Scope.READ, Scope.WRITE]),
        "expire_time": st.none() | st.integers(1, 3).map(lambda days: NOW + timedelta(days)),
        "disable_time": st.none() | st.just(NOW),
        "allowed_networks": st.lists(st.sampled_from(NETWORKS), max_size=2).map(tuple),
        "permissions": st.lists(st.sampled_from(PERMISSIONS), max_size=3).map(tuple),
    }
)


def token(**fields: Any) -> TokenRecord:
    record = TokenRecord("tok_1", "acme", "ci", Scope.READ, NOW, None, "lk_…abcd", {"a": "b"})
    return record._replace(**fields)


def rules(record: TokenRecord) -> CachedToken:
    return CachedToken(
        token_id=record.id,
        account_id=record.account_id,
        scope=int(record.scope),
        expires=math.inf if record.expire_time is None else record.expire_time.timestamp(),
        token=b"",
        deleted=False,
        disabled=record.disable_time is not None,
        networks=Networks(record.allowed_networks) if record.allowed_networks else None,
        permissions=frozenset(record.permissions) if record.permissions else None,
        keep_until=0.0,
    )


def verdicts(record: TokenRecord) -> set[tuple[Any, ...]]:
    """The questions, over a sample of all kinds, that are VALID for a token."""
    found = set()
    for days in (0.5, 1.5, 2.5, 3.5):
        for scope in (0, 1, 2):
            for address in ADDRESSES:
                for permission in (None, *PERMISSIONS):
                    question = (
                        scope,
                        (NOW + timedelta(days)).timestamp(),
                        address,
                        () if permission is None else (permission,),
                    )
                    if decide(rules(record), *question) is Verdict.VALID:
                        found.add(question)
    return found


@given(values, values)
def test_a_change_that_does_not_narrow_keeps_every_right(old, new):
    """If `narrows` says no, whatever was VALID before is VALID afterwards. So the call need not
    wait for verifiers."""
    before, after = token(**old), token(**new)
    if not narrows(before, after):
        assert verdicts(before) <= verdicts(after)
    if decides_alike(before, after):
        assert not narrows(before, after)
        assert verdicts(before) == verdicts(after)


@given(values)
def test_each_kind_of_restriction_narrows(fields):
    """A lower scope, an earlier expiry, a removed permission, fewer networks and Disable narrow."""
    wide = token(
        **fields | {"scope": Scope.WRITE, "disable_time": None, "expire_time": None}
    )._replace(permissions=("orders:*",), allowed_networks=("10.0.0.0/8",))
    for narrower in (
        {"scope": Scope.READ},
        {"expire_time": NOW},
        {"disable_time": NOW},
        {"permissions": ("orders:read",)},
        {"permissions": ()},
        {"allowed_networks": ("10.1.0.0/16",)},
        {"allowed_networks": ("::/0",)},
        {"rate_limit": RateLimit(100, 1, 20)},
    ):
        assert narrows(wide, wide._replace(**narrower)), narrower
    assert narrows(wide._replace(allowed_networks=()), wide)
    assert not narrows(wide, wide._replace(allowed_networks=()))
    assert not narrows(wide, wide._replace(permissions=("orders:*", "users:read")))
    assert not narrows(wide, wide._replace(allowed_networks=("0.0.0.0/0",)))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (None, (1_000_000, 1, 1_000_000), True),
        ((1, 3_600, 1), None, False),
        ((60, 60, 5), (1, 1, 5), False),
        ((60, 60, 5), (60, 60, 6), False),
        ((60, 60, 5), (61, 60, 5), False),
        ((60, 60, 5), (59, 60, 500), True),
        ((60, 60, 5), (600, 60, 4), True),
        ((1, 1, 5), (3_599, 3_600, 5), True),
    ],
)
def test_a_lower_rate_or_burst_narrows(old, new, expected):
    """A limit narrows if its rate is lower or its burst smaller, whatever its period is."""
    before, after = (
        token(rate_limit=None if limit is None else RateLimit(*limit)) for limit in (old, new)
    )
    assert narrows(before, after) is expected
    assert not decides_alike(before, after)
    assert decides_alike(before, before)


FIELDS: dict[str, Any] = {
    "name": "new",
    "scope": 2,
    "expire_time": NOW + timedelta(1),
    "labels": {"k": "v"},
    "description": "text",
    "allowed_networks": ["10.0.0.1"],
    "permissions": ["orders:read"],
    "rate_limit": (100, timedelta(minutes=1), 0),
}


@given(st.sets(st.sampled_from(sorted(FIELDS)), min_size=1))
def test_update_sets_exactly_the_listed_fields(paths):
    """Listed fields get the new values, and all others keep theirs."""
    new = NewValues(sorted(paths), **FIELDS)
    assert values_violations(new, NOW) == []
    after = updated(token(), new)
    expected = FIELDS | {
        "allowed_networks": ("10.0.0.1/32",),
        "permissions": ("orders:read",),
        "rate_limit": RateLimit(100, 60, 100),
    }
    for field in FIELDS:
        wanted = expected[field] if field in paths else getattr(token(), field)
        assert getattr(after, field) == wanted, field


@given(st.lists(st.text(max_size=20), max_size=40))
def test_only_known_paths(paths):
    """A mask with any other path is refused, whatever else it lists."""
    violations = values_violations(NewValues(["name", *paths], name="x"), NOW)
    if not set(paths) <= set(FIELDS):
        assert [violation.field for violation in violations] == ["update_mask"]


@given(st.ip_addresses(), st.integers(0, 128))
def test_networks_are_stored_in_one_form(address, length):
    """A network is stored as ipaddress writes it, and IPv4-mapped ones as IPv4."""
    length = min(length, address.max_prefixlen)
    network = ipaddress.ip_network((address, length), strict=False)
    stored = canonical_network(str(network).upper())
    assert stored is not None
    assert canonical_network(stored) == stored
    # It permits the same addresses, by the rules of the verdict.
    assert Networks([stored]).allow(str(network.network_address)) or length < 96


@given(st.text(max_size=60))
def test_any_text_is_a_network_or_refused(text):
    """No text raises an exception, and what is accepted can be parsed by verifiers."""
    stored = canonical_network(text)
    if stored is not None:
        Networks([stored])


def test_many_networks_cost_nothing():
    """The number is checked before the contents."""
    violations: list[Any] = []
    assert networks_in(["nonsense"] * 100_000, violations) == ()
    assert len(violations) == 1
