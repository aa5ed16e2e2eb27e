"""Where calls come from."""

import pytest
from latchkey_service.access.origin import client_address, network_of


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:db8:1:2::9", "2001:db8:1:2::"),
        ("fe80::1%eth0", "fe80::"),
    ],
)
def test_addresses(host: str, expected: str) -> None:
    """An IPv6 network of a host counts as one address, and a mapped IPv4 address as itself."""
    assert network_of(host) == expected


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("10.0.0.1, 192.0.2.7", "192.0.2.7"),
        ("2001:DB8::1", "2001:db8::1"),
        ("fe80::1%any text", "fe80::1"),
        ("192.0.2.7, somebody", ""),
        ("", ""),
    ],
)
def test_only_an_address_counts_as_one(header: str, expected: str) -> None:
    """The audit log gets the address that the nearest proxy reports, and no other text."""
    assert client_address((("x-forwarded-for", header),)) == expected
