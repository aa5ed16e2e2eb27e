"""Finds the addresses of a target that accept connections, to explain a failed call."""

import socket
from typing import Final

__all__ = ["listening"]

# The other addresses have refused at once, so this one is near too.
CONNECT_SECONDS: Final = 1.0
# localhost has two. A name with many addresses has none that matters more than the others.
ADDRESSES_MAX: Final = 4


def listening(target: str) -> list[str]:
    """Return those addresses of `target` that accept connections, as gRPC targets.

    Returns an empty list if the target has no port or too many addresses. One address is enough,
    because the system may know fewer addresses of localhost than gRPC, which always tries both.
    """
    host, separator, port = target.removeprefix("dns:///").rpartition(":")
    if not separator or not port.isdigit() or "/" in host or "," in host:
        return []
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    if len(found) > ADDRESSES_MAX:
        return []
    accepting = []
    for family, _, _, _, address in found:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.settimeout(CONNECT_SECONDS)
            try:
                probe.connect(address)
            except OSError:
                continue
        if family is socket.AF_INET6:
            accepting.append(f"ipv6:[{address[0]}]:{port}")
        else:
            accepting.append(f"ipv4:{address[0]}:{port}")
    return accepting
