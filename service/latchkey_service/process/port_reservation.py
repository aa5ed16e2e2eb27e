"""Reserves the addresses of the service, so that no other program uses them now or later.

The supervisor uses it on behalf of its workers, which listen on the addresses themselves.
"""

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latchkey_service.settings.settings import PREFIX

__all__ = ["AddressError", "reserved"]

# Workers of a killed supervisor need a moment to release the address.
ADDRESS_TIMEOUT_SECONDS = 3.0
POLL_SECONDS = 0.2


class AddressError(Exception):
    """The address is not available. The message says why and what to do."""


@contextlib.contextmanager
def reserved(listen: str | None, setting: str = "LISTEN") -> Iterator[Any]:
    """Reserve the address for the workers, and yield it.

    The workers share a port by SO_REUSEPORT. With that option, a second service could silently take
    a share of the calls. So the address is first tried without it. Then a socket that never listens
    keeps the port, even while no worker uses it. If the port is 0, this also determines the actual
    port.
    """
    if listen is None:
        yield None
        return
    if listen.startswith("unix:"):
        path = Path(listen.removeprefix("unix:"))
        _clear_unix_socket(path)
        try:
            yield listen
        finally:
            path.unlink(missing_ok=True)
        return
    host, _, port = listen.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise AddressError(
            f"{PREFIX}{setting}: {host} is not an address of this machine: {error}"
        ) from None
    family, _, _, _, address = found[0]
    with (
        _listening_alone(family, address, listen, setting) as probe,
        socket.socket(family, socket.SOCK_STREAM) as keeper,
    ):
        # Without SO_REUSEADDR, which would let another service's probe bind as well.
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # The probe stays until the keeper is bound: of two services that start, one gets the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        address = probe.getsockname()
        try:
            keeper.bind(address)
        except OSError:
            # Old connections of a program that did not share the port are in TIME_WAIT.
            probe.close()
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            keeper.bind(address)
        probe.close()
        yield f"{host}:{address[1]}"


def _listening_alone(family: int, address: Any, listen: str, setting: str) -> socket.socket:
    """Return a socket that listens on the address exclusively. Raises AddressError."""
    give_up = time.monotonic() + ADDRESS_TIMEOUT_SECONDS
    while True:
        probe = socket.socket(family, socket.SOCK_STREAM)
        # Ignore old connections in TIME_WAIT, but not another listener.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
            return probe
        except OSError as error:
            probe.close()
            if time.monotonic() > give_up:
                raise AddressError(
                    f"cannot listen on {listen}: {error.strerror}. Is another Latchkey "
                    f"running? {PREFIX}{setting} chooses another address"
                ) from None
        time.sleep(POLL_SECONDS)


def _clear_unix_socket(path: Path) -> None:
    """Remove a stale socket. Raises AddressError if a process answers on it."""
    if not path.exists():
        return
    if not path.is_socket():
        raise AddressError(f"cannot listen on {path}: the file exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(ADDRESS_TIMEOUT_SECONDS)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise AddressError(f"cannot listen on {path}: {error.strerror}") from None
    raise AddressError(f"cannot listen on {path}: another process is listening there")
