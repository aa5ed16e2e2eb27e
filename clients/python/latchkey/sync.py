"""`Verifier` and `Client` for programs without an event loop: Django, Flask, scripts.

    verifier = latchkey.sync.Verifier("127.0.0.1:50051")
    answer = verifier.verify(secret, latchkey.Scope.WRITE)

Each runs a thread with an event loop. There a `latchkey.Verifier` watches for changes and asks the
service, or a `latchkey.Client` makes calls. Cached answers are returned directly in the calling
thread.
"""

import asyncio
import functools
import os
import threading
import weakref
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any, Concatenate, Final, ParamSpec, Self, TypeVar

import grpc

from latchkey import _fork, _tracing
from latchkey import client as _client
from latchkey import verifier as _async
from latchkey._retry import TIMEOUTS_SECONDS, VERIFY_TIMEOUT_SECONDS, checked_timeout
from latchkey.access import Access
from latchkey.errors import InternalError, Unavailable, invalid, late
from latchkey.filters import TokenFilter, TokenOrder
from latchkey.models import (
    Scope,
    Token,
    Verification,
    VerifierStats,
)
from latchkey.secret import Secret

__all__ = ["Client", "Verifier", "ignore_idle_poller"]

P = ParamSpec("P")
T = TypeVar("T")

# Added to a call's own deadline, for a calling thread that is scheduled late.
MARGIN_SECONDS: Final = 1.0
# Half a second for releasing the grants, and a margin for a busy machine.
CLOSE_SECONDS: Final = 3.0


class Verifier:
    """Verifies secrets from any number of threads. See `latchkey.Verifier` for its cache.

    `target`, `access`, `credentials` and `options` are those of Client. The verifier's thread
    starts with the first verify that needs the service. Before that the process may fork, as
    gunicorn does, and each worker then starts its own thread. After that gRPC, and so the verifier,
    cannot be used in a forked child: verifies there raise Unavailable, and none is answered from
    the cache.

    The thread ends with close(), with the process, or when the verifier is garbage-collected.
    """

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        timeout_seconds: float = VERIFY_TIMEOUT_SECONDS,
        cache_entries: int = _async.CACHE_ENTRIES,
        cache_seconds: float = _async.CACHE_SECONDS,
        access: Access | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        # Neither object connects or binds to an event loop before the first verify.
        self._client = _client.Client(
            target, access=access, credentials=credentials, options=options
        )
        self._verifier = _async.Verifier(
            self._client,
            timeout_seconds=timeout_seconds,
            cache_entries=cache_entries,
            cache_seconds=cache_seconds,
        )
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._engine: _Engine | None = None
        self._closed = False
        _fork.watch(self)

    def verify(
        self,
        secret: str | Secret,
        scope: Scope | None = None,
        *,
        client_address: str = "",
        permissions: Collection[str] = (),
        timeout_seconds: float | None = None,
    ) -> Verification:
        """Answer whether `secret` is valid for `scope`, as `latchkey.Verifier.verify` does.

        Blocks the calling thread if the service has to be asked: at most for `timeout_seconds` or
        the verifier's own bound, whichever is shorter. On an overloaded machine it may take one
        second more.
        """
        if isinstance(permissions, str):
            raise invalid("permissions", "must be a collection of texts, not one text")
        answer = self._verifier.verify_nowait(
            secret, scope, client_address=client_address, permissions=permissions
        )
        if answer is not None:
            if _tracing.active:
                _tracing.note(answer)
            return answer
        checked_timeout(timeout_seconds)
        timeout = self._timeout_seconds
        if timeout_seconds is not None:
            timeout = min(timeout, timeout_seconds)
        return self._started().run(
            lambda: self._verifier.verify(
                secret,
                scope,
                client_address=client_address,
                permissions=permissions,
                timeout_seconds=timeout,
            ),
            "Verify",
            timeout,
        )

    def verify_nowait(
        self,
        secret: str | Secret,
        scope: Scope | None = None,
        client_address: str = "",
        permissions: Collection[str] = (),
    ) -> Verification | None:
        """Answer at once, as `latchkey.Verifier.verify_nowait` does, or return None."""
        return self._verifier.verify_nowait(secret, scope, client_address, permissions)

    def stats(self) -> VerifierStats:
        """Return the verifier's state: whether it answers from its cache, why not, and counters."""
        return self._verifier.stats()

    def close(self) -> None:
        """Stop watching and close the connection. Verifies in progress fail. Safe to repeat.

        Blocks for a bounded time, usually milliseconds.
        """
        with self._lock:
            self._closed = True
        if self._engine is not None:
            self._engine.stop()

    def forked(self) -> None:
        """Mark this process as a forked child. For the library's own use."""
        # Another thread of the parent may have held the lock. That thread does not exist in this
        # process, so it cannot release the lock.
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _started(self) -> "_Engine":
        """Return the engine, started. Raises Unavailable."""
        _check_process()
        with self._lock:
            if self._closed:
                raise _closed_error("verifier")
            if self._engine is None:
                self._engine = _start("verifier", self._client, self._verifier)
                # Stop the engine also at the end of the process, before its thread is killed.
                weakref.finalize(self, self._engine.stop)
            return self._engine


def _blocking(
    method: Callable[Concatenate[_client.Client, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["Client", P], T]:
    """Return the blocking form of a method of `latchkey.Client`."""
    name = method.__name__.title().replace("_", "")

    @functools.wraps(method)
    def call(self: "Client", /, *arguments: P.args, **options: P.kwargs) -> T:
        timeout: Any = options.get("timeout_seconds")
        return self._run(lambda client: method(client, *arguments, **options), name, timeout)

    return call


class Client:
    """A `latchkey.Client` whose methods block. Any number of threads may share it.

    The arguments are those of `latchkey.Client`. The client's thread starts with the first call.
    The process may fork before that, but not after it: calls in the child raise Unavailable. The
    thread ends with close(), with the process, or when the client is garbage-collected.
    """

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        timeout_seconds: float | None = None,
        access: Access | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        # It does not connect or bind to an event loop before the first call.
        self._client = _client.Client(
            target,
            timeout_seconds=timeout_seconds,
            access=access,
            credentials=credentials,
            options=options,
        )
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._engine: _Engine | None = None
        self._closed = False
        _fork.watch(self)

    create = _blocking(_client.Client.create)
    get = _blocking(_client.Client.get)
    get_usage = _blocking(_client.Client.get_usage)
    find = _blocking(_client.Client.find)
    get_limits = _blocking(_client.Client.get_limits)
    import_tokens = _blocking(_client.Client.import_tokens)
    list_page = _blocking(_client.Client.list_page)
    update = _blocking(_client.Client.update)
    disable = _blocking(_client.Client.disable)
    enable = _blocking(_client.Client.enable)
    rotate = _blocking(_client.Client.rotate)
    retire_secrets = _blocking(_client.Client.retire_secrets)
    revoke_secrets = _blocking(_client.Client.revoke_secrets)
    report_secrets = _blocking(_client.Client.report_secrets)
    delete = _blocking(_client.Client.delete)
    delete_all = _blocking(_client.Client.delete_all)
    verify = _blocking(_client.Client.verify)
    batch_verify = _blocking(_client.Client.batch_verify)
    invalidate_all = _blocking(_client.Client.invalidate_all)
    status = _blocking(_client.Client.status)
    audit_page = _blocking(_client.Client.audit_page)

    def list(
        self,
        account_id: str,
        wanted: TokenFilter = TokenFilter(),  # noqa: B008 - immutable
        *,
        order: TokenOrder = TokenOrder.NEWEST,
        reverse: bool = False,
        page_size: int = 0,
        timeout_seconds: float | None = None,
    ) -> Iterator[Token]:
        """Iterate over all of the account's live tokens that match `wanted`, in an order.

        Fetches the next page when the previous one is used up. `timeout_seconds` is per page.
        """
        position = ""
        while True:
            page = self.list_page(
                account_id,
                wanted,
                order=order,
                reverse=reverse,
                page_size=page_size,
                page_token=position,
                timeout_seconds=timeout_seconds,
            )
            yield from page.tokens
            if not page.next_page_token:
                return
            if page.next_page_token == position:
                raise InternalError("The service returned the same page of tokens again.")
            position = page.next_page_token

    def close(self) -> None:
        """Close the connection. Calls under way fail. Safe to repeat."""
        with self._lock:
            self._closed = True
        if self._engine is not None:
            self._engine.stop()

    def forked(self) -> None:
        """Mark this process as a forked child. For the library's own use."""
        # A thread of the parent may have held the lock. This process lacks it to release the lock.
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(
        self,
        make: Callable[[_client.Client], Coroutine[Any, Any, T]],
        name: str,
        timeout_seconds: float | None,
    ) -> T:
        timeout = checked_timeout(timeout_seconds) or self._timeout_seconds
        if timeout is None:
            # The call itself has the default deadline of its method, which is at most this.
            timeout = max(TIMEOUTS_SECONDS.values())
        _check_process()
        with self._lock:
            if self._closed:
                raise _closed_error("client")
            if self._engine is None:
                self._engine = _start("client", self._client)
                weakref.finalize(self, self._engine.stop)
            engine = self._engine
        return engine.run(lambda: make(self._client), name, timeout)


def _check_process() -> None:
    """Raise Unavailable in a child that was forked after gRPC was first used."""
    if _Engine.first_pid not in (None, os.getpid()):
        raise Unavailable(
            "The process was forked after gRPC was first used, and its child cannot use it. "
            "Fork before the first verify, or start workers without forking.",
            code=grpc.StatusCode.FAILED_PRECONDITION,
        )


def _start(
    owner: str, client: _client.Client, verifier: _async.Verifier | None = None
) -> "_Engine":
    try:
        return _Engine(owner, client, verifier)
    except (OSError, RuntimeError) as error:
        raise Unavailable(
            f"The {owner}'s thread cannot start: {error}. Try again. If that does not "
            "help, allow the process more threads and open files."
        ) from error


class _Engine:
    """A thread with an event loop, and the async client and verifier that live on it.

    It has no reference to its owner, the `Verifier` or `Client` of this module, which would never
    be garbage-collected. This is not anyio's portal, because a call and a stop must end within
    bounds, even during a garbage collection, and a forked child must get an error.
    """

    # The process that first used gRPC. In a child forked later, gRPC aborts the process or receives
    # its parent's events, even if everything was closed before the fork.
    first_pid: int | None = None

    def __init__(
        self, owner: str, client: _client.Client, verifier: _async.Verifier | None
    ) -> None:
        """Start. Raises OSError without file descriptors, and RuntimeError without a thread."""
        self._owner = owner
        self._client = client
        self._verifier = verifier
        # Reentrant: a garbage collection may run stop() in a thread that holds the lock.
        self._lock = threading.RLock()
        self._stopped = False
        self._stopping = asyncio.Event()
        # In the calling thread, which then gets the error. A verify handed to the event loop before
        # the thread runs it waits for that, within its time-out.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=f"latchkey {owner}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            self._loop.close()
            raise
        _Engine.first_pid = self._pid = os.getpid()

    def run(self, make: Callable[[], Coroutine[Any, Any, T]], name: str, timeout: float) -> T:
        """Make a call on the event loop, and wait for its result in the calling thread.

        The call has to end by itself within `timeout`.
        """
        # With the lock, so that no call is handed to an event loop that has stopped.
        with self._lock:
            if self._stopped:
                raise _closed_error(self._owner)
            future = asyncio.run_coroutine_threadsafe(make(), self._loop)
        try:
            return future.result(timeout + MARGIN_SECONDS)
        except TimeoutError:
            failure: Unavailable = late(name)
        except CancelledError:
            failure = _closed_error(self._owner)
        finally:
            future.cancel()
        raise failure

    def stop(self) -> None:
        """Close everything and end the thread. Waits for it, within bounds.

        A second caller waits too, because the process must not end before the thread.
        """
        if self._pid != os.getpid():
            return  # threads do not survive a fork
        with self._lock:
            if not self._stopped:
                self._stopped = True
                self._loop.call_soon_threadsafe(self._stopping.set)
        # A garbage collection may run this in the thread itself.
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop.set_exception_handler(ignore_idle_poller)
        await self._stopping.wait()
        if self._verifier is not None:
            await self._verifier.close()
        await self._client.close()
        # Verifies in progress have failed by now. Let their threads receive the error.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=1.0)


def ignore_idle_poller(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Handle an event loop's exceptions as usual, except for two harmless ones of gRPC.

    Set it on a loop with gRPC calls in a process that has other such loops, among them those of
    this module: `loop.set_exception_handler(latchkey.sync.ignore_idle_poller)`.
    """
    if "PollerCompletionQueue" in str(context.get("message")):
        error = context.get("exception")
        # If a process has several event loops, gRPC wakes all of them for each event. Those that
        # come too late log this error: https://github.com/grpc/grpc/issues/25364
        if isinstance(error, BlockingIOError):
            return
        # The first loop passes the event on, here to a loop that has ended, such as that of a
        # closed verifier. Nobody waits for the event.
        if isinstance(error, RuntimeError) and str(error) == "Event loop is closed":
            return
    loop.default_exception_handler(context)


def _closed_error(owner: str) -> Unavailable:
    return Unavailable(f"The {owner} is closed. Create a new one.", code=grpc.StatusCode.CANCELLED)
