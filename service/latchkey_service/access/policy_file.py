"""Keeps the policy file in force: read at the start, on SIGHUP, and when it changes.

A file that is broken is told in the log with line and reason, and what was in force stays.
"""

import asyncio
from pathlib import Path

from latchkey_service.access.gate import Gate
from latchkey_service.access.policy import Policy, PolicyError, parse
from latchkey_service.log import logger

__all__ = ["PolicyFile", "read_text"]

POLL_SECONDS = 1.0
# Some ten thousand callers.
SIZE_MAX = 4 * 1024 * 1024


def read_text(path: Path) -> str:
    """Return the file's text. Raises PolicyError."""
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_MAX + 1)
    except OSError as error:
        raise PolicyError(f"cannot be read: {error.strerror}") from None
    if len(data) > SIZE_MAX:
        raise PolicyError(f"is longer than {SIZE_MAX} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PolicyError(f"line {line}: is not UTF-8") from None


class PolicyFile:
    """The file behind a gate. Belongs to the event loop."""

    def __init__(self, path: Path, gate: Gate, text: str) -> None:
        self._path = path
        self._gate = gate
        # What is in force.
        self._text = text
        self._seen: object = None
        # Or one that was read before might come into force after one that was read later.
        self._lock = asyncio.Lock()
        self._log = logger()

    async def follow(self) -> None:
        """Look for changes until cancelled."""
        while True:
            if (seen := _signature(self._path)) != self._seen:
                self._seen = seen
                await self.reload()
            await asyncio.sleep(POLL_SECONDS)

    async def reload(self) -> None:
        """Read the file now. Never fails."""
        async with self._lock:
            await self._reload()

    async def _reload(self) -> None:
        try:
            text = await asyncio.to_thread(read_text, self._path)
            if text == self._text:
                return
            policy: Policy = await asyncio.to_thread(parse, text)
        except PolicyError as error:
            self._log.error("policy refused", path=str(self._path), error=str(error))
            return
        self._text = text
        self._gate.replace(policy)
        self._log.info("policy in force", path=str(self._path), callers=len(policy.callers))


def _signature(path: Path) -> object:
    """Return what changes when the file does, also when another one is moved in its place."""
    try:
        status = path.stat()
    except OSError as error:
        return error.errno
    return (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
