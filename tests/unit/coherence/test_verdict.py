"""The verdict, as the contract defines it: precedence, networks and permissions.

Server and client library use the same functions.
"""

import ipaddress
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latchkey_coherence.verdict import (
    PERMISSION,
    Networks,
    Verdict,
    decide,
    includes,
    parse_address,
)
from latchkey_service.tokens.verdict import CachedToken, Scope

NOW = 1_800_000_000.0
PERMISSIONS = ("orders:read", "orders:write", "orders:*", "users:read", "users:*")
NETWORKS = (None, Networks(["10.0.0.0/8", "2001:db8::/32"]))
ADDRESSES = ("", "10.1.2.3", "192.0.2.1", "2001:db8::1", "nonsense")
records = st.builds(
    CachedToken,
    token_id=st.just("tok_1"),
    scope=st.sampled_from([Scope.READ, Scope.WRITE]),
    expires=st.just(math.inf)
    | st.just(-math.inf)
    | st.integers(-2, 2).map(lambda us: NOW + us / 1e6),
    token=st.just(b""),
    deleted=st.booleans(),
    disabled=st.booleans(),
    networks=st.sampled_from(NETWORKS),
    permissions=st.none() | st.frozensets(st.sampled_from(PERMISSIONS), min_size=1),
    keep_until=st.just(0.0),
)


@given(
    records,
    st.integers(-1, 3) | st.integers(-(2**31), 2**31 - 1),
    st.sampled_from(ADDRESSES),
    st.lists(st.sampled_from(PERMISSIONS), max_size=3),
)
def test_precedence(record, required_scope, address, required):
    """DELETED, DISABLED, EXPIRED, ADDRESS_NOT_ALLOWED, INSUFFICIENT_SCOPE,
    INSUFFICIENT_PERMISSIONS, VALID: the first that applies."""
    granted = record.permissions or frozenset()
    applies = [
        (Verdict.DELETED, record.deleted),
        (Verdict.DISABLED, record.disabled),
        (Verdict.EXPIRED, record.expires <= NOW),
        (
            Verdict.ADDRESS_NOT_ALLOWED,
            record.networks is not None and address not in ("10.1.2.3", "2001:db8::1"),
        ),
        (
            Verdict.INSUFFICIENT_SCOPE,
            required_scope not in {0, 1, *([2] if record.scope is Scope.WRITE else [])},
        ),
        (
            Verdict.INSUFFICIENT_PERMISSIONS,
            any(p not in granted and p.split(":")[0] + ":*" not in granted for p in required),
        ),
        (Verdict.VALID, True),
    ]
    expected = next(verdict for verdict, holds in applies if holds)
    assert decide(record, required_scope, NOW, address, required) is expected


networks = st.ip_addresses().flatmap(
    lambda ip: st.integers(0, ip.max_prefixlen).map(
        lambda length: ipaddress.ip_network((ip, length), strict=False)
    )
)


@given(st.lists(networks, min_size=1, max_size=5), st.ip_addresses())
def test_networks_agree_with_the_standard_library(listed, address):
    """An address is allowed if and only if ipaddress finds it in one of the networks."""
    expected = any(address in network for network in listed if network.version == address.version)
    if address.version == 6 and address.ipv4_mapped:
        expected = any(address.ipv4_mapped in n for n in listed if n.version == 4)
    assert Networks(map(str, listed)).allow(str(address)) is expected


@given(st.ip_addresses(v=4), st.integers(0, 32))
def test_mapped_addresses_count_as_ipv4(address, length):
    """An IPv4-mapped IPv6 address is treated as the IPv4 address, in every notation."""
    network = ipaddress.ip_network((address, length), strict=False)
    allowed = Networks([str(network)])
    number = int(address)
    for text in (f"::ffff:{address}", f"::FFFF:{number >> 16:x}:{number & 0xFFFF:x}"):
        assert allowed.allow(text)
        assert not Networks(["::/0"]).allow(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", " 10.0.0.1", "10.0.0.1 ", "10.0.0.1/32", "10.0.0", "10", "0x0a000001", "010.0.0.1"),
        *(
            "fe80::1%eth0",
            "10.0.0.1%eth0",
            "[::1]",
            "10.0.0.1:443",
            "a" * 1_000_000,
            "::ffff:",
            "١٠.0.0.1",
        ),
    ],
)
def test_other_texts_are_in_no_network(text):
    """Text that is not exactly one address without a zone is refused by every list of networks."""
    assert parse_address(text) is None
    assert not Networks(["0.0.0.0/0", "::/0"]).allow(text)


@given(st.text(max_size=60))
def test_any_text_is_an_address_or_refused(text):
    """No text raises an exception."""
    Networks(["0.0.0.0/0", "::/0"]).allow(text)


@pytest.mark.parametrize(
    "required",
    [
        "",
        ":",
        "orders",
        "orders:",
        ":read",
        "orders:*x",
        "orders:re*",
        "orders:read:x",
        "*:*",
        "*",
        "Orders:read",
        "orders:read\n",
        " orders:read",
    ],
)
def test_a_malformed_permission_is_never_included(required):
    """A required text that is not a permission is refused even by a token with a wildcard."""
    assert PERMISSION.fullmatch(required) is None
    assert not includes(frozenset({"orders:*", "orders:read"}), [required])


def test_wildcard():
    """`resource:*` includes every action on the resource, and only `resource:*` includes itself."""
    assert includes(frozenset({"orders:*"}), ["orders:read", "orders:write", "orders:*"])
    assert not includes(frozenset({"orders:*"}), ["order:read"])
    assert not includes(frozenset({"orders:read", "orders:write"}), ["orders:*"])
    assert not includes(None, ["orders:read"])
    assert includes(None, [])
