"""A receiver of events on loopback, which checks their signatures as the specification says."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from standardwebhooks import Webhook

__all__ = ["SECRET", "Receiver", "receiving"]

SECRET = "whsec_" + "QUJD" * 11  # gitleaks:allow - base64 of 33 bytes that protect nothing


class Receiver:
    """Keeps the events that it accepts, and answers with `status`."""

    def __init__(self) -> None:
        self.url = ""
        self.status = 204
        self.events: list[dict[str, Any]] = []
        """Verified messages, in the order of arrival, with the header `webhook-id` as `id`."""
        self.requests = 0
        self.running = 0
        self.running_max = 0
        self.gate: asyncio.Event | None = None
        """If set, each request waits for it before its answer."""

    def types(self) -> list[str]:
        """Return the types of the accepted events."""
        return [event["type"] for event in self.events]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii").split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in head[1:-2])
                # Signatures and ids are case-sensitive.
                for line in head[1:-2]:
                    name, _, value = line.partition(": ")
                    headers[name.lower()] = value
                body = await reader.readexactly(int(headers["content-length"]))
                await self._answer(head[0], headers, body)
                writer.write(f"HTTP/1.1 {self.status} x\r\ncontent-length: 0\r\n\r\n".encode())
                await writer.drain()
        writer.close()

    async def _answer(self, request: str, headers: dict[str, str], body: bytes) -> None:
        assert request == "POST /hook?key=1 HTTP/1.1"
        event = Webhook(SECRET).verify(body, headers)
        self.requests += 1
        self.running += 1
        self.running_max = max(self.running_max, self.running)
        try:
            if self.gate is not None:
                await self.gate.wait()
        finally:
            self.running -= 1
        if self.status < 300:
            self.events.append({"id": headers["webhook-id"], **event})


@contextlib.asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    """Run a receiver."""
    receiver = Receiver()
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    receiver.url = f"http://127.0.0.1:{port}/hook?key=1"
    try:
        yield receiver
    finally:
        server.close()
