"""Ports for what has to be told its own before it starts."""

import contextlib
import errno
import random
import socket
from pathlib import Path

__all__ = ["free_port"]

# The ports that Linux gives to connections that go out, and to who asks for any.
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
# Where the others begin theirs, at the soonest (RFC 6335 §6).
EPHEMERAL_FIRST = 49_152
UNPRIVILEGED_FIRST = 1_024
# Not the usual one, which hypothesis seeds the same in each process.
_chance = random.SystemRandom()


def free_port() -> int:
    """Return a port that nobody has now, nor will have who does not ask for it by its number.

    None that the kernel gives away: between this and its use, any connection might be given it. And
    any of thousands, so that tests which run beside each other do not choose the same.
    """
    first = EPHEMERAL_FIRST
    with contextlib.suppress(OSError, ValueError):
        first = int(EPHEMERAL.read_text().split()[0])
    others = range(max(first // 2, UNPRIVILEGED_FIRST), first)
    if not others:
        # The kernel gives all away here.
        with socket.create_server(("127.0.0.1", 0)) as probe:
            return int(probe.getsockname()[1])
    while not _is_free(port := _chance.choice(others)):
        pass
    return port


def _is_free(port: int) -> bool:
    """Tell whether nobody has it, on whatever address."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            with socket.socket(family) as probe:
                probe.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            # Without IPv6 nobody has it there.
    return True
