"""A server of the `native` transport without its library's Rust part."""

import asyncio
from collections.abc import Sequence
from typing import Any

from latchkey_service.errors import Overloaded, StatusParts, status_of
from latchkey_service.transport import native
from pygrpc_native import EVENT_CANCEL

__all__ = [
    "BATCH",
    "CALL",
    "CREATE",
    "DELETE",
    "HEALTH",
    "PATHS",
    "STATUS",
    "VERIFY",
    "Front",
    "Server",
    "turn",
]

VERIFY = "/latchkey.v1.TokenService/Verify"
CREATE = "/latchkey.v1.TokenService/Create"
HEALTH = "/grpc.health.v1.Health/Check"
BATCH = "/latchkey.v1.TokenService/BatchVerify"
STATUS = "/latchkey.v1.StatusService/GetStatus"
DELETE = "/latchkey.v1.TokenService/Delete"
PATHS = (VERIFY, CREATE, HEALTH, BATCH, STATUS, DELETE)
CALL = 0


class Front:
    """Stands in for the library's Rust part."""

    def __init__(self) -> None:
        self.come: list[Any] = []
        self.failed: list[tuple[int, int]] = []
        self.closed = False

    def close(self) -> None:
        self.closed = True

    def recv_batch_details(self, most: int, _timeout_ms: int) -> list[Any]:
        batch, self.come = self.come[:most], self.come[most:]
        return batch

    def fail(self, call_id: int, code: int, _message: str, trailing_metadata: Any) -> None:
        # The library raises ValueError for other keys that begin with grpc-.
        assert [key for key, _ in trailing_metadata] == ["x-request-id", "grpc-status-details-bin"]
        self.failed.append((call_id, code))


class Server(native.Server):
    """The server without its transport. It records the calls that each turn starts."""

    def __init__(self, screen: native.Screen | None = None) -> None:
        self.clock = 1_000.0
        self.delay_seconds = 0.0
        super().__init__([], self.reject_all, lambda: self.clock, screen)
        self.front = self._front = Front()  # type: ignore[assignment]
        self._queues.set_paths(PATHS)
        self._table = [(path, None) for path in PATHS]  # type: ignore[misc]
        # As if other calls were arriving too.
        self._others_at = self.clock
        self.started: list[int] = []
        self.cancelled: list[int] = []
        self.rejected: list[str] = []

    def reject_all(
        self,
        path: str,
        seconds: float | None,
        error: Exception | None = None,
        peer: str = "",
    ) -> tuple[StatusParts, float]:
        assert seconds is None
        self.rejected.append(path)
        return status_of(error or Overloaded("busy"), "id"), self.delay_seconds

    def come(
        self, path: str, ids: Sequence[int], metadata: Sequence[Any] = (), data: bytes = b""
    ) -> None:
        """Let calls arrive."""
        details = (tuple(metadata), "ipv4:10.0.0.1:5", None)
        self._on_events([(CALL, n, PATHS.index(path), data, None, details) for n in ids])

    def leave(self, number: int) -> None:
        self._on_events([(EVENT_CANCEL, number, 0, None, None, None)])


async def turn() -> None:
    await asyncio.sleep(0)
