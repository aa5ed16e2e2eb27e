"""`Verifier` for threaded services: Django, Flask, anything without an event loop.

    verifier = latchkey.sync.Verifier("127.0.0.1:50051")
    answer = verifier.verify(secret, latchkey.Scope.WRITE)

It owns a thread with an event loop, on which the `latchkey.Verifier` that it stands for watches
and asks. What the memory can tell is answered in the calling thread.
"""

import asyncio
import os
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import CancelledError
from types import TracebackType
from typing import Any, Final, Self

import grpc

from latchkey import _fork
from latchkey import verifier as _async
from latchkey._retry import VERIFY_TIMEOUT_SECONDS, checked_timeout
from latchkey.access import Access
from latchkey.client import Client
from latchkey.errors import DeadlineExceeded, Unavailable, late
from latchkey.models import Scope, Verification, VerifierStats
from latchkey.secret import Secret

__all__ = ["Verifier"]

# A verify ends by its own deadline. This is for a thread that does not get its turn in time.
MARGIN_SECONDS: Final = 1.0
# Half a second for saying goodbye, and what a busy machine adds.
CLOSE_SECONDS: Final = 3.0
# As long as a thread may take to begin, on a machine that is all but standing still. Not how long a
# verify waits for it: that is the verify's own time. After this, the next one tries another thread.
START_SECONDS: Final = 10.0


class Verifier:
    """Verifies secrets from any number of threads; see `latchkey.Verifier` for what it remembers.

    `target`, `access`, `credentials` and `options` are as Client takes them. Its thread begins
    with the first verify that needs the service. Until then it may be copied by a fork, as
    gunicorn does: each worker then has a thread of its own. After that gRPC, and so the verifier,
    cannot be used in a forked child: verifies raise Unavailable there, and none is answered from
    memory.

    It ends with close(), with the process, or when nothing refers to it any more.
    """

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        timeout_seconds: float = VERIFY_TIMEOUT_SECONDS,
        memory_entries: int = _async.MEMORY_ENTRIES,
        memory_seconds: float = _async.MEMORY_SECONDS,
        access: Access | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        # Neither connects, nor takes to an event loop, before the first verify.
        self._client = Client(target, access=access, credentials=credentials, options=options)
        self._verifier = _async.Verifier(
            self._client,
            timeout_seconds=timeout_seconds,
            memory_entries=memory_entries,
            memory_seconds=memory_seconds,
        )
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._engine: _Engine | None = None
        self._finalizer: weakref.finalize[[], Verifier] | None = None
        self._closed = False
        _fork.watch(self)

    def verify(
        self,
        secret: str | Secret,
        scope: Scope | None = None,
        *,
        timeout_seconds: float | None = None,
    ) -> Verification:
        """Answer whether `secret` may do what needs `scope`, as `latchkey.Verifier.verify` does.

        When the service has to be asked it blocks the calling thread, at most for
        `timeout_seconds` or the verifier's own bound, whichever is less, and one second more if
        the machine is too busy.
        """
        answer = self._verifier.verify_nowait(secret, scope)
        if answer is not None:
            return answer
        checked_timeout(timeout_seconds)
        timeout = self._timeout_seconds
        if timeout_seconds is not None:
            timeout = min(timeout, timeout_seconds)
        end = time.monotonic() + timeout
        return self._started().verify(secret, scope, end)

    def verify_nowait(
        self, secret: str | Secret, scope: Scope | None = None
    ) -> Verification | None:
        """Answer at once, as `latchkey.Verifier.verify_nowait` does; None: it cannot."""
        return self._verifier.verify_nowait(secret, scope)

    def stats(self) -> VerifierStats:
        """Return how it is doing: whether it answers from memory, why not, and how much."""
        return self._verifier.stats()

    def close(self) -> None:
        """Stop to watch and close the connection. Verifies under way fail. Safe to repeat.

        Blocks for a bounded time, mostly milliseconds.
        """
        with self._lock:
            self._closed = True
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.stop()

    def forked(self) -> None:
        """Take note that this process is a forked child. For the library's own use."""
        # Another thread may have held the lock, and is not here to give it back.
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _started(self) -> "_Engine":
        """Return the thread that asks the service, which may not be there yet.

        Raises Unavailable when there can be none.
        """
        with self._lock:
            if self._closed:
                raise _closed_error()
            if self._engine is not None and not self._engine.is_lost():
                return self._engine
            engine = self._engine = _Engine(self._verifier, self._client)
            if self._finalizer is not None:
                self._finalizer.detach()
            # Also at the end of the process, and before the thread is lost with it. The
            # engine must not refer to this object, or it would never end.
            self._finalizer = weakref.finalize(self, engine.stop)
        # Without the lock: nobody who has less time, or wants to close, waits for a thread here.
        engine.start()
        return engine


class _Engine:
    """A thread with an event loop, and the verifier that lives on it.

    Its thread either comes to run, or is given up before that: then it touches nothing that the
    next one uses.
    """

    # Which process first used gRPC. In a child that was forked from it after that, gRPC aborts the
    # process or takes its parent's events, even when everything had been closed before.
    first_pid: int | None = None

    def __init__(self, verifier: _async.Verifier, client: Client) -> None:
        self._pid = os.getpid()
        if _Engine.first_pid not in (None, self._pid):
            raise _forked_error()
        self._verifier = verifier
        self._client = client
        # Reentrant: garbage collection may call stop(), as a finalizer, in a thread that has it.
        self._lock = threading.RLock()
        self._running = self._has_run = False
        self._given_up = False
        self._failure: Exception | None = None
        # It runs, or is given up.
        self._settled = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event
        self._thread = threading.Thread(target=self._run, name="latchkey verifier", daemon=True)
        self._late_at = time.monotonic() + START_SECONDS

    def start(self) -> None:
        """Start the thread. What goes wrong, verify() raises.

        Python waits here until the thread has run for the first time, however long the operating
        system takes: the one wait that is not bounded by the caller's time.
        """
        try:
            self._thread.start()
        except RuntimeError as error:
            self._fail(error)

    def is_lost(self) -> bool:
        """Tell whether it takes another one, because this one failed; too late is a failure."""
        if self._pid != os.getpid():
            return True  # a forked child has only what is written down of it
        if not self._settled.is_set() and time.monotonic() >= self._late_at:
            self._fail(TimeoutError(f"it did not begin within {START_SECONDS:g} s"))
        return self._failure is not None

    def verify(self, secret: str | Secret, scope: Scope | None, end: float) -> Verification:
        """Verify on the event loop, and wait for that in the calling thread.

        `end` is when to give up, by the monotonic clock.
        """
        if not self._settled.wait(end - time.monotonic()):
            raise DeadlineExceeded(
                "Verify failed: the verifier's thread did not start in time. "
                "Try again, or allow more time with timeout_seconds."
            )
        if self._failure is not None:
            raise Unavailable(
                f"The verifier's thread cannot start: {self._failure}. Try again; "
                "if that does not help, allow the process more threads and open files."
            ) from self._failure
        timeout = end - time.monotonic()
        if timeout <= 0:
            raise late("Verify")
        # With the lock, so that nothing is left to an event loop that runs no more.
        with self._lock:
            if not self._running or self._loop is None:
                raise _closed_error()
            _Engine.first_pid = self._pid
            future = asyncio.run_coroutine_threadsafe(
                self._verifier.verify(secret, scope, timeout_seconds=timeout), self._loop
            )
        try:
            return future.result(timeout + MARGIN_SECONDS)
        except TimeoutError:
            failure: Unavailable = late("Verify")
        except CancelledError:
            failure = _closed_error()
        finally:
            future.cancel()
        raise failure

    def stop(self) -> None:
        """Let the thread close what is open and end; wait for it, within bounds.

        A thread that does not run yet has nothing open. It ends as soon as it comes to that, and
        is not waited for.
        """
        if self._pid != os.getpid():
            return
        with self._lock:
            self._given_up = True
            running, self._running = self._running, False
            self._has_run = self._has_run or running
            if running and self._loop is not None:
                self._loop.call_soon_threadsafe(self._stopping.set)
        self._settled.set()
        # Whoever comes second waits as well: the end of the process must not come before.
        if self._has_run and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_SECONDS)

    def _fail(self, error: Exception) -> None:
        """Give up, unless it runs or somebody else did, and tell those who wait why."""
        with self._lock:
            if self._running or self._given_up:
                return
            self._given_up = True
            self._failure = error
        self._settled.set()

    def _run(self) -> None:
        try:
            # An event loop takes open files, of which there may be no more. asyncio.run would then
            # leave behind, with a warning, the coroutine that it was called with.
            with asyncio.Runner() as runner:
                runner.run(self._serve())
        except Exception as error:
            if self._loop is not None:
                raise
            self._fail(error)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(ignore_idle_poller)
        self._stopping = asyncio.Event()
        with self._lock:
            self._running = not self._given_up
        if not self._running:
            return
        self._settled.set()
        await self._stopping.wait()
        await self._verifier.close()
        await self._client.close()
        # Verifies under way have failed by now, and their threads are to hear it from themselves.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=1.0)


def ignore_idle_poller(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Handle an event loop's exceptions as usual, but for two that mean nothing."""
    if "PollerCompletionQueue" in str(context.get("message")):
        error = context.get("exception")
        # With several event loops in a process, gRPC wakes all of them for each event, and those
        # that come too late log this error: https://github.com/grpc/grpc/issues/25364
        if isinstance(error, BlockingIOError):
            return
        # The one that comes first passes the event on, here to one that has ended since, as that of
        # a verifier that was closed. Nobody waits for it any more.
        if isinstance(error, RuntimeError) and str(error) == "Event loop is closed":
            return
    loop.default_exception_handler(context)


def _closed_error() -> Unavailable:
    return Unavailable("The verifier is closed. Make a new one.", code=grpc.StatusCode.CANCELLED)


def _forked_error() -> Unavailable:
    return Unavailable(
        "The process was forked after gRPC was first used, and its child cannot use it. "
        "Verify for the first time after forking, or start workers by other means.",
        code=grpc.StatusCode.FAILED_PRECONDITION,
    )
