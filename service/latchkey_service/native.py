"""pygrpc-native's server (0.5.0), with what it lacks. Imported only where it is used."""

from typing import Any

# Not as `from ... import aio`, which sends the package's lazy attributes into an endless recursion.
import pygrpc_native.aio

__all__ = ["Server"]


class Server(pygrpc_native.aio.Server):
    """A server that forgets calls which were cancelled before they began.

    It keeps each call, its request included, until the call's task has ended, and leaves it to the
    task to remove it. A task that is cancelled before its first step does nothing at all, so that a
    client which cancels its calls at once would fill the memory.
    """

    def _on_events(self, events: list[tuple[Any, ...]]) -> None:
        super()._on_events(events)
        for kind, call_id, *_ in events:
            if kind == pygrpc_native.EVENT_CANCEL:
                self._forget_when_done(call_id)

    def _forget_when_done(self, call_id: int) -> None:
        call = self._calls.get(call_id)
        if call is not None and call.task is not None:
            call.task.add_done_callback(lambda _: self._calls.pop(call_id, None))
