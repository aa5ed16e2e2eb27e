"""The client's address behind trusted proxies."""

from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latchkey.guards._address import TrustedProxies, grpc_peer_address

PROXIES = TrustedProxies(["10.0.0.0/8", "192.168.7.1", "2001:db8::/32"])
PROXY = "10.0.0.1"


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "address"),
    [
        # Not a trusted proxy: the header is the client's invention.
        ("192.0.2.1", ["198.51.100.1"], "192.0.2.1"),
        ("192.168.7.2", ["198.51.100.1"], "192.168.7.2"),
        ("2001:db9::1", ["198.51.100.1"], "2001:db9::1"),
        # One proxy.
        (PROXY, ["198.51.100.1"], "198.51.100.1"),
        ("192.168.7.1", ["198.51.100.1"], "198.51.100.1"),
        ("2001:db8::5", ["2001:db9::1"], "2001:db9::1"),
        ("::ffff:10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        # The client sent a forged header, and the proxy appended the true address.
        (PROXY, ["203.0.113.5, 198.51.100.1"], "198.51.100.1"),
        (PROXY, ["203.0.113.5", "198.51.100.1"], "198.51.100.1"),
        (PROXY, ["10.0.0.9, 198.51.100.1"], "198.51.100.1"),
        # Two proxies.
        (PROXY, ["203.0.113.5, 198.51.100.1, 10.9.9.9"], "198.51.100.1"),
        (PROXY, ["203.0.113.5, 198.51.100.1", "10.9.9.9"], "198.51.100.1"),
        # A client inside of the trusted network.
        (PROXY, ["10.3.3.3"], "10.3.3.3"),
        (PROXY, ["10.4.4.4, 10.3.3.3"], "10.4.4.4"),
        # Spaces, ports, IPv4 in IPv6.
        (PROXY, ["203.0.113.5 ,\t198.51.100.1 "], "198.51.100.1"),
        (PROXY, ["198.51.100.1:4711"], "198.51.100.1"),
        (PROXY, ["[2001:db9::1]:4711"], "2001:db9::1"),
        (PROXY, ["[2001:db9::1]"], "2001:db9::1"),
        (PROXY, ["::ffff:198.51.100.1"], "198.51.100.1"),
        # A trusted proxy that does not say for whom it asks, or says it wrongly: not known.
        (PROXY, [], ""),
        (PROXY, [""], ""),
        (PROXY, ["198.51.100.1,"], ""),
        (PROXY, ["198.51.100.1", ""], ""),
        (PROXY, ["198.51.100.1, unknown"], ""),
        (PROXY, ["198.51.100.1, 10.0.0.1, _hidden"], ""),
        (PROXY, ["fe80::1%eth0"], ""),
        (PROXY, ["198.51.100.01"], ""),
        (PROXY, ["198.51.100.1:99999999"], ""),
        # No peer: a UNIX socket that is not trusted.
        ("", ["198.51.100.1"], ""),
    ],
)
def test_the_header_is_read_from_the_right(
    peer: str, forwarded_for: list[str], address: str
) -> None:
    """The address is the last one that is not a trusted proxy. What a client invented, to the left
    of it, is never used, not even in place of a damaged entry."""
    assert PROXIES.client_address(peer, forwarded_for) == address


def test_without_trusted_proxies_the_header_is_ignored() -> None:
    """The address is then that of the peer, even if it is a private one."""
    for peer in ("10.0.0.1", "::1", "", "testclient"):
        assert TrustedProxies(()).client_address(peer, ["198.51.100.1"]) == peer


def test_a_unix_socket_can_be_trusted() -> None:
    """A proxy on a UNIX socket has no address. It is trusted only if it is named."""
    proxies = TrustedProxies(["unix"])
    assert proxies.client_address("", ["203.0.113.5, 198.51.100.1"]) == "198.51.100.1"
    assert proxies.client_address("", []) == ""
    assert proxies.client_address("192.0.2.1", ["198.51.100.1"]) == "192.0.2.1"


@given(st.text(), st.lists(st.text() | st.ip_addresses().map(str), max_size=4))
@settings(deadline=None)  # the machine may be busy
def test_no_header_breaks_it(peer: str, forwarded_for: list[str]) -> None:
    """Any texts lead to one address or none. What an untrusted peer sends does not matter."""
    proxies = TrustedProxies(["10.0.0.0/8"])
    found = proxies.client_address(PROXY, forwarded_for)
    assert not found or ip_address(found)
    assert proxies.client_address(f"x{peer}", forwarded_for) == f"x{peer}"


@pytest.mark.parametrize(
    "networks", ["10.0.0.0/8", ["10.0.0.1/8"], ["proxy.example"], ["*"], [""], ["10.0.0.0/33"]]
)
def test_invalid_networks_are_rejected(networks: Any) -> None:
    """A typing error in the trusted proxies is found when the guard is created."""
    with pytest.raises((TypeError, ValueError)):
        TrustedProxies(networks)


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.1:50051", "192.0.2.1"),
        ("ipv6:[2001:db8::1]:50051", "2001:db8::1"),
        ("ipv6:%5B2001:db8::1%5D:50051", "2001:db8::1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:50051", "fe80::1%eth0"),
        ("unix:", ""),
        ("unix:/run/latchkey.sock", ""),
        ("unix-abstract:name", ""),
        ("vsock:3:5", ""),
        ("", ""),
    ],
)
def test_grpc_peers(peer: str, address: str) -> None:
    """Names of gRPC for peers are translated to addresses. Others have none."""
    assert grpc_peer_address(peer) == address
