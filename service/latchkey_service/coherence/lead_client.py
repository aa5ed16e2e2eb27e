"""A sibling's connection to the lead of its host.

Owns the socket, the wait for answers and its bound. `host_rows` decides when to use it.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from latchkey_service.coherence.host_lead import UnaskedLog
from latchkey_service.coherence.host_messages import (
    LINE_BYTES_MAX,
    decode,
    encode,
    unasked_log_of,
)
from latchkey_service.errors import NO_ANSWER, StoreUnavailable
from latchkey_service.settings.logs import logger

__all__ = ["LeadConnection", "LeadGone"]


class LeadGone(Exception):
    """The lead does not answer, or will stop. The sibling has to take its own row."""


class LeadConnection:
    """Asks one question at a time. Event loop only."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        silence_seconds: float,
        on_news: Callable[[str], None],
    ) -> None:
        self._reader, self._writer = reader, writer
        self._silence_seconds = silence_seconds
        # Called with the kind of news: "log", "unasked log", "lease", "closing", or "gone".
        self._on_news = on_news
        # The latest log that was sent. It repeats entries of earlier ones that are still needed.
        self._unasked: UnaskedLog | None = None
        # At most one answer, and the lines about its progress.
        self._lines: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._read(), name="lead reader")

    @classmethod
    async def open(
        cls,
        path: str,
        identity: dict[str, Any],
        silence_seconds: float,
        on_news: Callable[[str], None],
    ) -> "LeadConnection":
        """Connect and introduce this process. Raises LeadGone."""
        try:
            async with asyncio.timeout(silence_seconds):
                reader, writer = await asyncio.open_unix_connection(path, limit=LINE_BYTES_MAX)
        except OSError as error:  # TimeoutError included
            raise LeadGone from error
        connection = cls(reader, writer, silence_seconds, on_news)
        try:
            await connection.ask({"kind": "hello", "identity": identity})
        except BaseException:
            connection.drop()
            raise
        return connection

    async def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer. After an error, drop the connection: an answer may arrive late.

        Raises LeadGone if the lead is silent, and StoreUnavailable if it has no lease.
        """
        self._write(request)
        while True:
            try:
                async with asyncio.timeout(self._silence_seconds):
                    answer = await self._lines.get()
            except TimeoutError:
                raise LeadGone from None
            if answer is None or "closing" in answer:
                raise LeadGone
            if "unavailable" in answer:
                raise StoreUnavailable(NO_ANSWER)
            if "alive" not in answer:
                return answer

    def take_unasked(self) -> UnaskedLog | None:
        """Return the log that the lead has sent without a question, once."""
        unasked, self._unasked = self._unasked, None
        return unasked

    def release(self) -> None:
        """Send the lead that this process answers no longer under its lease. Does not wait."""
        with contextlib.suppress(LeadGone):
            self._write({"kind": "release"})

    def drop(self) -> None:
        """Close the connection, after what was written."""
        self._task.cancel()
        self._writer.close()

    def _write(self, request: dict[str, Any]) -> None:
        # uvloop raises RuntimeError for a write after the other end has closed.
        if self._writer.is_closing():
            raise LeadGone
        self._writer.write(encode(request))

    async def _read(self) -> None:
        try:
            while line := await self._reader.readline():
                message = decode(line)
                if "news" in message:
                    self._hear(message)
                else:
                    self._lines.put_nowait(message)
        except OSError:
            # The lead has gone.
            pass
        except (ValueError, KeyError, TypeError) as error:
            logger().warning("line of the lead not understood", error=type(error).__name__)
        finally:
            self._lines.put_nowait(None)
        self._on_news("gone")

    def _hear(self, message: dict[str, Any]) -> None:
        kind = message["news"]
        if kind == "log" and (unasked := unasked_log_of(message)):
            self._unasked, kind = unasked, "unasked log"
        self._on_news(kind)
