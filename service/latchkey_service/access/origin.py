"""Where a call comes from: a client's address, and the person behind a caller.

Anyone can send these headers, so each counts only from senders that the operator trusts: the
address from the trusted proxy, and the person from callers with `reports_people` in the policy.
They serve the audit log and the limits per address, and never decide access.
"""

from collections.abc import Iterable
from ipaddress import IPv4Address, ip_address, ip_network
from typing import Final
from urllib.parse import unquote

from latchkey_service.secret_format import contains_secret

__all__ = [
    "ADDRESSES",
    "PERSON",
    "PERSON_LENGTH_MAX",
    "client_address",
    "network_of",
    "person",
    "source_of",
]

# The proxy adds the address of its client at the end.
ADDRESSES: Final = "x-forwarded-for"
# Percent-encoded UTF-8, because metadata is ASCII.
PERSON: Final = "x-latchkey-person"
PERSON_LENGTH_MAX: Final = 128
# Whoever gets one IPv6 address usually has at least such a network (RFC 6177 §2).
_IPV6_PREFIX: Final = 64
_Metadata = Iterable[tuple[str, str | bytes]] | None


def client_address(metadata: _Metadata) -> str:
    """Return the address that the nearest proxy reports, or "" if it reports no address.

    Only for listeners that trust a proxy. What comes before the last element is the client's own
    claim.
    """
    last = ""
    for key, value in metadata or ():
        if key == ADDRESSES:
            last = value if isinstance(value, str) else ""
    try:
        # Without a zone, which may be any text.
        return str(ip_address(last.rpartition(",")[2].strip().partition("%")[0]))
    except ValueError:
        return ""


def network_of(host: str) -> str:
    """Return the key under which peers at `host` share a limit. Raises ValueError."""
    address = ip_address(host.partition("%")[0])
    if isinstance(address, IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ip_network((address, _IPV6_PREFIX), strict=False).network_address)


def source_of(peer: str, metadata: _Metadata, *, proxied: bool) -> str:
    """Return the key under which the peers of calls share a limit, or "" if they share none.

    `peer` is as gRPC reports it. `proxied` says that the peer is the trusted proxy, whose clients
    then count.
    """
    if proxied:
        host = client_address(metadata)
    else:
        # Such as ipv6:%5B::1%5D:50051. A UNIX socket has no address.
        host = unquote(peer.partition(":")[2].rpartition(":")[0]).strip("[]")
    try:
        return network_of(host)
    except ValueError:
        return ""


def person(metadata: _Metadata) -> str:
    """Return the person that the caller reports, or "" if it reports none, several, or no text."""
    values = [value for key, value in metadata or () if key == PERSON]
    if len(values) != 1 or not isinstance(values[0], str):
        return ""
    try:
        name = unquote(values[0], errors="strict").strip()
    except UnicodeDecodeError:
        return ""
    if len(name) > PERSON_LENGTH_MAX or not name.isprintable() or contains_secret(name):
        return ""
    return name
