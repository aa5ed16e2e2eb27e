"""Follows the policy file: on SIGHUP, and when it has changed, it is read once it stands still.

A file that is broken is told in the log with line and reason, and what was right before stays. One
process follows it for all workers (`supervisor.py`).
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

from latchkey_service.access.policy import PolicyError, parse
from latchkey_service.log import logger

__all__ = ["SIZE_MAX", "PolicyFile", "read_text"]

# From a change to its being read it takes two looks: one second at most.
LOOK_SECONDS = 0.5
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
    """The file, and what it said when it was last right. Belongs to the event loop.

    `changed` is called with each text that is right and another one than that before.

    A file that is being written, instead of moved into its place, may be read half-way, and the
    half that ends with a line may be a policy, which allows more than the whole: without the line
    that has a caller's `accounts`, it is all of them. So a file is read only when two looks in a
    row have found the same, and what was read counts only if a third one, after it, has as well.
    """

    def __init__(self, path: Path, text: str, changed: Callable[[str], None]) -> None:
        self.text = text
        self._path = path
        self._changed = changed
        # What the last look found, and what was there when the file was last read.
        self._seen: object = None
        self._read: object = None
        self._log = logger()

    async def follow(self) -> None:
        """Look for changes until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_SECONDS)

    def reload(self) -> None:
        """Have the file read whether it has changed or not, once it stands still."""
        self._read = None

    async def look(self) -> None:
        """Look at the file, and read it if it stands still and was not read so. Never fails."""
        seen = _signature(self._path)
        still, self._seen = seen == self._seen, seen
        if not still or seen == self._read:
            return
        self._read = seen
        text, refused = self.text, None
        try:
            text = await asyncio.to_thread(read_text, self._path)
            if text != self.text:
                await asyncio.to_thread(parse, text)
        except PolicyError as error:
            refused = error
        except Exception as error:  # noqa: BLE001 - what was right stays in force, and is followed
            refused = PolicyError(f"cannot be understood ({type(error).__name__})")
        if _signature(self._path) != seen:
            # The next looks see to it.
            return
        if refused is not None:
            self._log.error("policy refused", path=str(self._path), error=str(refused))
        elif text != self.text:
            self.text = text
            self._changed(text)


def _signature(path: Path) -> object:
    """Return what changes when the file does, also when another one is moved in its place."""
    try:
        status = path.stat()
    except OSError as error:
        return error.errno
    return (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
