"""Runs the receiver: binds its address and serves until SIGINT, SIGTERM or SIGHUP."""

from typing import ClassVar, Final

from latchkey_console.connections import Protocol
from latchkey_console.receiver.app import make_app
from latchkey_console.receiver.settings import ReceiverSettings
from latchkey_console.running import bound, serve

__all__ = ["run"]

# Each may hold a body of 2 MiB before anyone has checked its signature.
CONNECTIONS_MAX: Final = 64


class ReceiverProtocol(Protocol):
    """A connection of the receiver."""

    connections_max: ClassVar[int] = CONNECTIONS_MAX


def run(settings: ReceiverSettings) -> None:
    """Serve on the main thread. Raises SettingsError if the address is unavailable."""
    with bound(settings.host, settings.port) as listener:
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        greeting = f"Leak reports: http://{shown}:{port} ({settings.action}). Ctrl-C stops it."
        serve(make_app(settings), ReceiverProtocol, listener, "latchkey.receiver", greeting)
