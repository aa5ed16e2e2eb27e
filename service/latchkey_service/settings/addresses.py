"""Which machines can reach an address. Pure."""

import ipaddress

__all__ = ["is_local"]


def is_local(listen: str) -> bool:
    """Return whether only processes of this machine can reach an address.

    The only name that counts is "localhost" (RFC 6761 §6.3), because others may resolve elsewhere.
    """
    if listen.startswith("unix:"):
        return True
    host = listen.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False
