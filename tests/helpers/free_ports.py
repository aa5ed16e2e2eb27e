"""Ports for programs that must know theirs before they start."""

import contextlib
import errno
import random
import socket
from pathlib import Path

__all__ = ["free_port"]

# The ports that Linux gives to outgoing connections and to programs that request any port.
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
# The lowest start of that range on other systems (RFC 6335 §6).
EPHEMERAL_FIRST = 49_152
UNPRIVILEGED_FIRST = 1_024
# Not the usual generator, because hypothesis seeds it the same in each process.
_chance = random.SystemRandom()


def free_port() -> int:
    """Return a free port, which other programs get only if they request it by number.

    It is outside the range from which the kernel assigns ports, because otherwise any connection
    might take it before its use. It is one of thousands, so that concurrent tests rarely choose the
    same.
    """
    first = EPHEMERAL_FIRST
    with contextlib.suppress(OSError, ValueError):
        first = int(EPHEMERAL.read_text().split()[0])
    others = range(max(first // 2, UNPRIVILEGED_FIRST), first)
    if not others:
        # The kernel assigns all ports here.
        with socket.create_server(("127.0.0.1", 0)) as probe:
            return int(probe.getsockname()[1])
    while not _is_free(port := _chance.choice(others)):
        pass
    return port


def _is_free(port: int) -> bool:
    """Return whether the port is free on all addresses."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            with socket.socket(family) as probe:
                probe.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            # Without IPv6 it is free there.
    return True
