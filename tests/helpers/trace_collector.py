"""A collector of traces on loopback, which decodes what OTLP exporters send."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

__all__ = ["Collector", "collecting"]


class Collector:
    """Keeps the spans that it receives, each with the attributes of its resource."""

    def __init__(self) -> None:
        self.url = ""
        self.status = 200
        self.requests = 0
        self.spans: list[tuple[dict[str, str], Any]] = []
        self.bytes = b""
        """Everything that was received."""
        self.gate: asyncio.Event | None = None
        """If set, each request waits for it before its answer."""

    def named(self, name: str) -> list[tuple[dict[str, str], Any]]:
        return [(resource, span) for resource, span in self.spans if span.name == name]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii").split("\r\n")
                assert head[0] == "POST /v1/traces HTTP/1.1"
                headers = dict(line.lower().split(": ", 1) for line in head[1:-2])
                body = await reader.readexactly(int(headers["content-length"]))
                self.requests += 1
                if self.gate is not None:
                    await self.gate.wait()
                if self.status == 200:
                    self._take(body)
                writer.write(f"HTTP/1.1 {self.status} x\r\ncontent-length: 0\r\n\r\n".encode())
                await writer.drain()
        writer.close()

    def _take(self, body: bytes) -> None:
        self.bytes += body
        for sent in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = {each.key: each.value.string_value for each in sent.resource.attributes}
            self.spans += [(resource, span) for scope in sent.scope_spans for span in scope.spans]


@contextlib.asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    """Run a collector."""
    collector = Collector()
    server = await asyncio.start_server(collector.serve, "127.0.0.1", 0)
    collector.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield collector
    finally:
        server.close()
