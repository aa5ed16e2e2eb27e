"""Decides whether a token may do what a verify asks. Pure.

Server processes and client libraries decide with the same code, so that an answer from any cache is
the one that the service would give. Owns the precedence of verdicts, and the rules for networks and
permissions. Does not own the lookup of the token, the lease, or the validation of what owners
enter.
"""

import enum
import re
from collections.abc import Collection, Iterable
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final, Protocol

__all__ = [
    "PERMISSION",
    "Networks",
    "Rules",
    "Verdict",
    "decide",
    "decide_live",
    "includes",
    "parse_address",
]

# Each part has at most 31 characters, so that the largest list fits into a few kilobytes.
PERMISSION: Final = re.compile(r"[a-z0-9_.-]{1,31}:([a-z0-9_.-]{1,31}|\*)")
# "ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255". A longer text is not an address.
_ADDRESS_LENGTH_MAX: Final = 45


class Verdict(enum.IntEnum):
    """Answer to "may this secret do this?", numbered as in the contract."""

    VALID = 1
    MALFORMED = 2
    UNKNOWN = 3
    DELETED = 4
    EXPIRED = 5
    INSUFFICIENT_SCOPE = 6
    DISABLED = 7
    ADDRESS_NOT_ALLOWED = 8
    INSUFFICIENT_PERMISSIONS = 9
    RATE_LIMITED = 10


# In Python 3.11, reading a member from its class takes as long as the rest of a decision.
_VALID: Final = Verdict.VALID


class Networks:
    """The networks from which a token may be used, parsed once."""

    __slots__ = ("_v4", "_v6")

    def __init__(self, networks: Iterable[str]) -> None:
        """Parse networks in canonical CIDR notation. Raises ValueError for anything else."""
        v4, v6 = [], []
        for text in networks:
            if ":" in text:
                v6.append(IPv6Network(text))
            else:
                v4.append(IPv4Network(text))
        # Numbers, because the comparison of network objects takes ten times as long.
        self._v4 = tuple((int(n.netmask), int(n.network_address)) for n in v4)
        self._v6 = tuple((int(n.netmask), int(n.network_address)) for n in v6)

    def contain(self, address: IPv4Address | IPv6Address) -> bool:
        """Return whether one of the networks contains the address."""
        number = int(address)
        networks = self._v4 if address.version == 4 else self._v6
        return any(number & mask == network for mask, network in networks)

    def allow(self, client_address: str) -> bool:
        """Return whether a client at `client_address`, any text, may use the token."""
        address = parse_address(client_address)
        return address is not None and self.contain(address)


class Rules(Protocol):
    """What the verdict on a secret depends on."""

    @property
    def deleted(self) -> bool:
        """Whether the token was deleted."""
        ...

    @property
    def disabled(self) -> bool:
        """Whether the token is disabled."""
        ...

    @property
    def expires(self) -> float:
        """When the secret stops working, in seconds of Unix time. May be infinite."""
        ...

    @property
    def networks(self) -> Networks | None:
        """The networks from which it may be used. None: any address."""
        ...

    @property
    def scope(self) -> int:
        """The number of the token's scope."""
        ...

    @property
    def permissions(self) -> frozenset[str] | None:
        """The token's permissions. None: it has none."""
        ...


def parse_address(text: str) -> IPv4Address | IPv6Address | None:
    """Return the IP address in `text`, or None. An IPv4-mapped IPv6 address becomes IPv4.

    An address with a zone (RFC 4007) is not accepted: networks have none.
    """
    if len(text) > _ADDRESS_LENGTH_MAX or "%" in text:
        return None
    try:
        if ":" not in text:
            return IPv4Address(text)
        address = IPv6Address(text)
    except AddressValueError:
        return None
    return address.ipv4_mapped or address


def includes(granted: frozenset[str] | None, required: Iterable[str]) -> bool:
    """Return whether a token with the permissions `granted` has all of `required`."""
    if granted is None:
        return not any(True for _ in required)
    return all(
        permission in granted
        # A text that is not a permission, such as "orders:", must not match "orders:*".
        or (
            PERMISSION.fullmatch(permission) is not None
            and permission.partition(":")[0] + ":*" in granted
        )
        for permission in required
    )


def decide(
    rules: Rules,
    required_scope: int,
    now: float,
    client_address: str = "",
    required_permissions: Collection[str] = (),
) -> Verdict:
    """Return the verdict at the time `now` (Unix time) on a secret with these rules.

    `required_scope` is a number of the contract's enum. No token includes a number that this
    release does not know, so a newer caller is rejected and never admitted by mistake.
    """
    if rules.deleted:
        return Verdict.DELETED
    if rules.disabled:
        return Verdict.DISABLED
    if rules.expires <= now:
        return Verdict.EXPIRED
    if rules.networks is None and not required_permissions:
        # Most verifies end here: a second call would cost as much as this decision.
        return _VALID if 0 <= required_scope <= rules.scope else Verdict.INSUFFICIENT_SCOPE
    return decide_live(rules, required_scope, client_address, required_permissions)


def decide_live(
    rules: Rules,
    required_scope: int,
    client_address: str = "",
    required_permissions: Collection[str] = (),
) -> Verdict:
    """Return the verdict on a secret that is neither deleted, nor disabled, nor expired."""
    if rules.networks is not None and not rules.networks.allow(client_address):
        return Verdict.ADDRESS_NOT_ALLOWED
    # Levels are ordered, and each includes all lower ones. Negative numbers are not levels.
    if not 0 <= required_scope <= rules.scope:
        return Verdict.INSUFFICIENT_SCOPE
    if required_permissions and not includes(rules.permissions, required_permissions):
        return Verdict.INSUFFICIENT_PERMISSIONS
    return Verdict.VALID
