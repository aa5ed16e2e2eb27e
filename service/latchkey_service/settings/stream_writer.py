"""Writes lines to a stream from a thread, so that a reader that hangs cannot stop the service.

A pipe holds 64 KiB. When its reader stops reading, like a log collector whose own output hangs, the
next write blocks, and with it the event loop: every call, health and the reaction to SIGTERM. So
nothing but this thread writes to the stream. Its queue is bounded; lines that do not fit are
dropped and counted.

Not logging.handlers.QueueListener: its end waits for the stream without a bound.
"""

import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

__all__ = ["StreamWriter"]

# About ten thousand lines: a reader may pause for seconds without a loss. Small beside a worker's
# memory.
QUEUE_BYTES_MAX: Final = 4 * 1024 * 1024
# At the end, this long for the remaining lines. A reader that needs more hangs.
FLUSH_SECONDS: Final = 1.0
# Pause between attempts at a stream that does not block, because another program made it so.
RETRY_SECONDS: Final = 0.1


class StreamWriter:
    """The thread and the queue of one file descriptor. `put` may be called in any thread.

    Writes to the descriptor itself: the interpreter waits at its end for the lock of `sys.stderr`,
    which a thread that hangs would hold.
    """

    def __init__(self, file: int, bytes_max: int = QUEUE_BYTES_MAX) -> None:
        self._file = file
        self._bytes_max = bytes_max
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self.dropped = 0
        """The lines that were dropped: there was no room, or the stream failed. Only increases."""
        self._reported = 0
        self.on_dropped: Callable[[int], None] = lambda _: None
        """Called in the thread when lines flow again, with the number of dropped lines."""

    def put(self, data: bytes) -> None:
        """Queue lines. Never blocks; if the queue is full, they are dropped and counted."""
        with self._changed:
            if self._bytes + len(data) > self._bytes_max:
                self.dropped += 1
                return
            self._lines.append(data)
            self._bytes += len(data)
            self._changed.notify_all()

    def start(self) -> None:
        """Start to write. Lines queue until then, for a process that must not have threads yet."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="stream writer", daemon=True)
            self._thread.start()

    def stop(self, seconds: float = FLUSH_SECONDS) -> None:
        """Write the queued lines, for a bounded time. Lines that come later are not written."""
        self.start()
        end = time.monotonic() + seconds
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            while self._bytes and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)

    def _run(self) -> None:
        # The main thread handles signals. This thread outlives its event loop, and Python's handler
        # would then write to the loop's closed pipe and print a traceback.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            with self._changed:
                while not self._lines:
                    if self._stopping:
                        return
                    self._changed.wait()
                data = self._lines.popleft()
            written = self._write(data)
            with self._changed:
                # Counted until it is written, so that `stop` waits for it.
                self._bytes -= len(data)
                self.dropped += not written
                self._changed.notify_all()
                # With room for the report, which is queued like any line.
                flows = written and self._bytes <= self._bytes_max // 2
                new = self.dropped - self._reported if flows else 0
                self._reported += new
            if new:
                self.on_dropped(new)

    def _write(self, data: bytes) -> bool:
        """Write all of `data`, however long that takes. Return False if the stream failed."""
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._file, left) :]
            except BlockingIOError:
                select.select((), (self._file,), (), RETRY_SECONDS)
            except OSError:
                # No reader, or a full disk: later lines may succeed.
                return False
        return True
