"""Bounds what clients can hold: connections, the time to send a request, and running requests.

A connection that has not sent a complete request is cheap, and anyone can open one. So connections
do not count as requests: half-sent requests never keep others from being served.
"""

import asyncio
import logging
from typing import Any, ClassVar, Final

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from latchkey_console.forms import BODY_BYTES_MAX

__all__ = ["CONNECTIONS_MAX", "RECEIVE_SECONDS", "REQUESTS_MAX", "Protocol", "RequestLimit"]

_log = logging.getLogger("latchkey.console")


# Each takes a file, and many systems allow a process 1,024. The client of Latchkey, the log and the
# sign-in need some as well.
CONNECTIONS_MAX: Final = 800
# The time for a request to arrive, counted from the connection or from the last answer. Longer than
# an idle connection is kept, and enough for a form over a slow network.
RECEIVE_SECONDS: Final = 20.0
# Complete requests that are being answered, each of which may wait for Latchkey. Further requests
# get 503.
REQUESTS_MAX: Final = 500
# For an answer by the application. A Delete waits for verifiers for a few seconds.
ANSWER_SECONDS: Final = 60.0
# From the end of the request until the client has read the answer.
DELIVERY_SECONDS: Final = ANSWER_SECONDS + 10.0


class Protocol(H11Protocol):
    """A connection of uvicorn that must send its requests in time.

    If there are too many connections, the one that has been sending its request for the longest
    time is closed. So a new client is always served.
    """

    connections_max: ClassVar[int] = CONNECTIONS_MAX
    receiving_until: float | None = None
    """When the connection is closed unless it has sent a request by then. None: it has."""
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Start the time for the first request."""
        super().connection_made(transport)
        self._receive()
        if len(self.connections) > self.connections_max:
            waiting = [
                (other.receiving_until, number, other)
                for number, other in enumerate(self.connections)
                if isinstance(other, Protocol) and other.receiving_until is not None
            ]
            # Never empty: this connection waits too.
            _, _, oldest = min(waiting)
            oldest.give_up()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the time."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Handle data. The last byte of a request ends its time, not the first one."""
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """Start the time for the next request."""
        self._receive()
        super().on_response_complete()
        # The next request may have arrived already.
        self._look()

    def give_up(self) -> None:
        """Close the connection without an answer."""
        self.receiving_until = None
        # Not close(), which waits until the client has read everything.
        self.transport.abort()

    def _receive(self) -> None:
        self._start(RECEIVE_SECONDS)
        self.receiving_until = self.loop.time() + RECEIVE_SECONDS

    def _look(self) -> None:
        """If a request is complete, start the time for its answer."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and not self.cycle.more_body and self.receiving_until is not None:
            self.receiving_until = None
            self._start(DELIVERY_SECONDS)

    def _start(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self.give_up)


class RequestLimit:
    """Middleware that bounds the number of running requests and the time of each.

    A request counts once it is complete. Requests for `open_paths` do not count, because they are
    answered at once. The application refuses bodies of more than `body_bytes_max`.
    """

    def __init__(
        self, app: ASGIApp, open_paths: frozenset[str], body_bytes_max: int = BODY_BYTES_MAX
    ) -> None:
        self._app = app
        self._body_bytes_max = body_bytes_max
        self._open_paths = open_paths
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        received = await _complete(receive, self._body_bytes_max)
        if received is None:
            return
        if self._running >= REQUESTS_MAX:
            busy = PlainTextResponse("This page is busy. Try again soon.\n", 503)
            busy.headers["retry-after"] = "1"
            await busy(scope, receive, send)
            return

        async def replay() -> Message:
            return received.pop(0) if received else await receive()

        self._running += 1
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await self._app(scope, replay, send)
        except TimeoutError:
            # uvicorn ends a connection whose answer is incomplete, with a line in its log.
            _log.warning("no answer in time at %s", scope["path"])
        finally:
            self._running -= 1


async def _complete(receive: Receive, bytes_max: int) -> list[Message] | None:
    """Return the messages of a request's body, or None if the client leaves before its end.

    A body that is too large is returned in part; the application refuses it.
    """
    messages: list[Any] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        messages.append(message)
        size += len(message.get("body", b""))
        if size > bytes_max or not message.get("more_body", False):
            return messages
