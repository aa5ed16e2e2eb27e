"""Finds the address of the client behind trusted proxies. Pure.

A guard passes it to the verifier, for tokens that are limited to networks.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Final
from urllib.parse import unquote

from latchkey_coherence.verdict import parse_address

# Some proxies append the client's port.
_WITH_PORT: Final = re.compile(r"([0-9.]+):[0-9]{1,5}|\[([0-9A-Fa-f:.]+)\](?::[0-9]{1,5})?")
_UNIX: Final = "unix"


class TrustedProxies:
    """The proxies whose header X-Forwarded-For is trusted.

    `networks` are in CIDR notation, or single addresses. "unix" stands for peers on a UNIX socket,
    which have no address. Raises TypeError or ValueError for anything else.
    """

    def __init__(self, networks: Collection[str]) -> None:
        if isinstance(networks, str):
            raise TypeError("trusted_proxies must be a collection of networks, not a single one")
        self._unix = _UNIX in networks
        self._networks: list[IPv4Network | IPv6Network] = [
            ip_network(network) for network in networks if network != _UNIX
        ]

    def client_address(self, peer: str, forwarded_for: Sequence[str]) -> str:
        """Return the client's address, or "" if it is not known.

        `peer` is the address at the other end of the connection, or "" if it has none.
        `forwarded_for` are the values of the headers X-Forwarded-For, in their order. They are read
        from the right, because each proxy appends the address of its own peer: everything to the
        left of the first address that is not a trusted proxy can be the client's invention.
        """
        if not self._trusts(peer):
            return peer
        address = ""  # a trusted proxy that does not say for whom it asks
        for entry in _from_the_right(forwarded_for):
            address = _address_in(entry)
            # No later entry is read in place of one that is empty or damaged.
            if not address or not self._trusts(address):
                break
        return address

    def _trusts(self, text: str) -> bool:
        if not text:
            return self._unix
        address = parse_address(text)
        # Networks of the other version contain no address.
        return address is not None and any(address in network for network in self._networks)


def grpc_peer_address(peer: str) -> str:
    """Return the address in gRPC's name for a peer ("ipv4:192.0.2.1:5"), or "" if it has none."""
    kind, _, rest = unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return ""
    return rest.rpartition(":")[0].strip("[]")


def _from_the_right(values: Sequence[str]) -> Iterator[str]:
    for value in reversed(values):
        yield from (entry.strip(" \t") for entry in reversed(value.split(",")))


def _address_in(entry: str) -> str:
    match = _WITH_PORT.fullmatch(entry)
    address = parse_address((match[1] or match[2]) if match else entry)
    return "" if address is None else str(address)
