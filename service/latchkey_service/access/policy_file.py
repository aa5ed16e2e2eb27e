"""Reloads the policy file after SIGHUP or a change, once the file has stopped changing.

If the new file is invalid, the mistakes are logged and the last valid policy stays active.
One process watches the file for all workers (`supervisor.py`).
"""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from latchkey_service.access.policy import PolicyError, parse
from latchkey_service.settings.file_access import POLICY, refusal
from latchkey_service.settings.logs import logger

__all__ = ["SIZE_MAX", "PolicyFile", "read_text"]

# A change is read after two checks: at most one second.
LOOK_SECONDS = 0.5
# Enough for about ten thousand callers.
SIZE_MAX = 4 * 1024 * 1024


def read_text(path: Path) -> str:
    """Return the file's text. Raises PolicyError."""
    try:
        with path.open("rb") as file:
            problem = refusal(path, os.fstat(file.fileno()), POLICY)
            data = file.read(SIZE_MAX + 1)
    except OSError as error:
        raise PolicyError(f"cannot be read: {error.strerror}") from None
    if problem is not None:
        raise PolicyError(f"is not safe: {problem}")
    if len(data) > SIZE_MAX:
        raise PolicyError(f"is larger than {SIZE_MAX} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PolicyError(f"line {line}: is not UTF-8") from None


class PolicyFile:
    """The policy file and its last valid text. Event loop only.

    Calls `changed` with each valid text that differs from the one before.

    A file that is written in place, rather than replaced by a rename, may be read half-written. The
    first half may be a valid policy that allows more than the whole: without the line `accounts`, a
    caller may act for all accounts. So the file is read only after two checks in a row found it
    unchanged, and the text is used only if a third check afterwards finds it unchanged as well.
    """

    def __init__(self, path: Path, text: str, changed: Callable[[str], None]) -> None:
        self.text = text
        self._path = path
        self._changed = changed
        # The file's signature at the last check, and at the last read.
        self._seen: object = None
        self._read: object = None
        self._log = logger()

    async def follow(self) -> None:
        """Check for changes until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_SECONDS)

    def reload(self) -> None:
        """Read the file again once it has stopped changing, even if it is the same as before."""
        self._read = None

    async def look(self) -> None:
        """Check the file; read it if it is unchanged since the last check but not read yet.

        Never raises.
        """
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
        except Exception as error:  # noqa: BLE001 - the last valid policy stays active
            refused = PolicyError(f"cannot be parsed ({type(error).__name__})")
        if _signature(self._path) != seen:
            # The file is still changing; later checks will read it.
            return
        if refused is not None:
            self._log.error("policy rejected", path=str(self._path), error=str(refused))
        elif text != self.text:
            self.text = text
            self._changed(text)


def _signature(path: Path) -> object:
    """Return a value that changes when the file is modified or replaced."""
    try:
        status = path.stat()
    except OSError as error:
        return error.errno
    return (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
