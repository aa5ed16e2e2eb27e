"""grpc.health.v1.Health: reports whether calls are likely to succeed. `periodic.py` decides that.

Not the servicer of grpcio-health-checking (1.75). In that one, the end of one watch cuts the others
off from further changes, and a watcher that does not read holds up every change. Its watches never
end, so each shutdown would last the whole grace period.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from latchkey_service.errors import NotFound

__all__ = ["Health"]

_Response = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):
    """The status of some services, the same for all. NOT_SERVING at first."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(services)
        self._serving = False
        self._stopping = False
        self._ended = False
        # Set and replaced at each change, which wakes everyone who holds the old one.
        self._changed = asyncio.Event()

    def set_serving(self, *, serving: bool) -> None:
        """Change the status. No effect during shutdown."""
        if not self._stopping:
            self._serving = serving
            self._wake()

    def stop(self) -> None:
        """Report NOT_SERVING from now on."""
        self.set_serving(serving=False)
        self._stopping = True

    def end_watches(self) -> None:
        """End the watches after they have sent the last status."""
        self._ended = True
        self._wake()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> _Response:
        """Return the status. Raises NotFound for an unknown service."""
        if request.service not in self._services:
            raise NotFound("Unknown service.", reason="SERVICE_NOT_FOUND")
        return _Response(status=self._status(request.service))

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> AsyncIterator[_Response]:
        """Send the status, and send it again after each change until the server stops."""
        sent: object = None
        while True:
            # Taken before the status is read, so no change in between is missed.
            changed = self._changed
            status = self._status(request.service)
            if status != sent:
                yield _Response(status=status)
                sent = status
                continue
            if self._ended:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "The server is stopping.")
            await changed.wait()

    def _status(self, service: str) -> Any:
        if service not in self._services:
            return _Response.SERVICE_UNKNOWN
        return _Response.SERVING if self._serving else _Response.NOT_SERVING

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
