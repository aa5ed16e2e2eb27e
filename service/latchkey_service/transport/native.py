"""The server of the `native` transport, with bounded, fair queues in front of the handlers.

The library (0.5.0) starts every call as soon as it arrives. With hundreds of calls in flight, each
turn of the event loop then takes as long as answering all of them, and a call that waits for
Postgres waits for several such turns. A flood of verifies would delay a Create by a second, and a
flood of Creates would delay the verifies. So calls wait in a queue per role, and each turn starts a
few from every queue.

The queues are bounded like others (`admission.py`), and share their places fairly among callers.
The calls that only take rights away have a queue that comes first. With a policy, a call waits only
if its metadata identify a caller. Others are refused before that, so anonymous calls take no place.

Streams of requests and unknown methods reach grpcio behind the library.

The server also discards calls that were cancelled before they started; the library would never free
them. And it ends streams whose clients do not read; the library would block a thread for each.

The library passes events in batches. If one of them cannot be handled, its call is answered with
INTERNAL, and the others of its batch are handled as usual.
"""

import asyncio
import math
import operator
import time
from asyncio import sleep
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol

import grpc

# `from pygrpc_native import aio` makes the package's lazy attributes (0.5.0) recurse endlessly.
import pygrpc_native.aio
from pygrpc_native import EVENT_CANCEL, STREAM_CLOSED, STREAM_FULL

from latchkey_service.errors import (
    INTERNAL_MESSAGE,
    PUSHBACK_METADATA,
    LatchkeyError,
    StatusParts,
    TimeoutMalformed,
    Unavailable,
)
from latchkey_service.fair_queue import SMALL_BYTES
from latchkey_service.settings.logs import logger
from latchkey_service.transport.native_queues import (
    ALONE_SECONDS,
    OPEN_IN_TURN,
    VERIFIES_ALONE,
    Event,
    Queue,
    Queues,
    seconds_left,
)

__all__ = ["Reject", "Screen", "Server", "metadata_of"]

# How many calls may start before new ones are fetched, and how many are fetched at most.
FETCH_AFTER: Final = 48
FETCH_MAX: Final = 256
# For the library's thread to send answers on busy cores. On idle ones it needs a thousandth.
ANSWERS_OUT_SECONDS: Final = 0.1
STOPPING_MESSAGE: Final = "The server is stopping. Nothing was done."
# Delays between attempts to send to a stream without room, and the time after which it is ended.
ROOM_SECONDS_MIN: Final = 0.001
ROOM_SECONDS_MAX: Final = 0.25
UNREAD_SECONDS: Final = 20.0
# Cancellations that overtook their calls; more than are ever in flight.
CANCELLED_MAX: Final = 2_000
# Rejections that wait. Further ones go out at once, which costs less here than in grpcio.
DELAYED_MAX: Final = 30_000
# The pause after the library failed to pass on a batch, so that a lasting failure does not use a
# whole core.
DISPATCH_AGAIN_SECONDS: Final = 0.1


class Reject(Protocol):
    """Returns the status for a rejected call, and the delay before sending it.

    `seconds` is how long its caller waits; None means no limit. Without an `error`, the call is
    rejected because too many others wait. An error that is not ours means that the call could not
    be handled. `peer` is the caller's address.
    """

    def __call__(
        self,
        path: str,
        seconds: float | None,
        error: Exception | None = None,
        peer: str = "",
    ) -> tuple[StatusParts, float]:
        """Count a rejection."""
        ...


# Returns the name of the caller that metadata seem to identify. Raises Unauthenticated.
Screen = Callable[[Any], str]


class Server(pygrpc_native.aio.Server):
    """A server on one plaintext address."""

    def __init__(
        self,
        options: Sequence[tuple[str, Any]],
        reject: Reject,
        monotonic: Callable[[], float] = time.monotonic,
        screen: Screen | None = None,
    ) -> None:
        # One thread for HTTP/2, not two: they share one core with Python, and switching between
        # them used a fifth of it. To use more cores, run more workers.
        super().__init__(options=options, io_threads=1)
        # The library serves a call with a malformed deadline as if it had none. With this setting,
        # each event carries the header beside the parsed deadline.
        self._front_args["client_key_metadata"] = "grpc-timeout"
        self._reject_call = reject
        self._monotonic = monotonic
        # None if there is no policy.
        self._screen = screen
        self._queues = Queues()
        # A cancellation may overtake its call: the library's thread and this one both fetch.
        self._cancelled: OrderedDict[int, None] = OrderedDict()
        self._opened = 0
        # Whether it is stopping, with its connections still open.
        self._finishing = False
        # When the last call other than a verify arrived.
        self._others_at = -math.inf
        # Whether this turn has started its share, with the next turn scheduled.
        self._in_turn = False
        # Calls started since the last fetch.
        self._begun = 0
        # Rejections that wait for their time, by call.
        self._delayed: dict[int, asyncio.TimerHandle] = {}

    async def start(self) -> None:
        """Start serving."""
        # Before the first event: the event loop does not run in between.
        await super().start()
        self._queues.set_paths([path for path, _ in self._table])

    async def stop(self, grace: float | None) -> None:
        """Stop after calls have had `grace` seconds to finish.

        The library (0.5.0) cannot announce that a connection will close, so clients keep using it.
        Until it closes, verifies and health checks are answered; other calls are rejected.
        """
        # Queued calls arrived before the stop, so they still run.
        self._pass_on(self._queues.take_all())
        if self._front is not None and not self._finishing:
            self._finishing = True
            tasks = [call.task for call in self._calls.values() if call.task is not None]
            stops: list[Awaitable[Any]] = []
            if self._fallback is not None:
                stops.append(self._fallback.stop(grace))
            if grace and tasks:
                stops.append(asyncio.wait(tasks, timeout=grace))
            await asyncio.gather(*stops)
            # Closing discards the answers that the library's thread has not sent yet. On busy
            # cores, an immediate close lost one answer in ten.
            await sleep(ANSWERS_OUT_SECONDS)
            # Calls that are still running then end with UNAVAILABLE.
            await asyncio.get_running_loop().run_in_executor(None, self._front.close)
        await super().stop(0)

    def _dispatch(self) -> None:
        """Pass batches to the event loop, until the server stops. Runs in the library's thread."""
        while True:
            try:
                super()._dispatch()
            except Exception as error:  # noqa: BLE001 - the thread must not end before the server
                logger().error("events not fetched", error=type(error).__name__)
                time.sleep(DISPATCH_AGAIN_SECONDS)
            else:
                return

    def _on_events(self, events: Sequence[Event]) -> None:
        """Queue the events in order; start a share if this turn has not started one."""
        if not self._in_turn and self._is_share(events):
            # Usually the queues are empty, and using them would add a twentieth to a verify's time.
            self._begin(events)
            return
        at_once: list[Event] = []
        now = self._monotonic()
        for event in events:
            try:
                self._receive(event, at_once, now)
            except Exception as error:  # noqa: BLE001 - one event must not stop the others
                self._answer_fault(event, error)
        if at_once:
            self._pass_on(at_once)
            self._forget_cancelled(at_once)
        if not self._in_turn:
            self._begin_some()

    def _receive(self, event: Event, at_once: list[Event], now: float) -> None:
        """Queue, reject or remove a call. Add events that must not wait to `at_once`."""
        kind, call_id, method_id = event[0], event[1], event[2]
        if kind == EVENT_CANCEL:
            if (rejection := self._delayed.pop(call_id, None)) is not None:
                # Its client has left. The rest of the delay would only use memory.
                rejection.cancel()
            elif not self._queues.remove(call_id):
                at_once.append(event)
            return
        if self._cancelled and call_id in self._cancelled:
            del self._cancelled[call_id]
            return
        queues = self._queues
        queue = queues.of_method[method_id]
        if self._finishing and queue not in (queues.verifies, queues.batches, queues.open):
            self._reject_event(event, Unavailable(STOPPING_MESSAGE))
            return
        if queue is not queues.verifies:
            self._others_at = now
        if (
            self._screen is None
            and len(event[3]) <= SMALL_BYTES
            and not has_malformed_timeout(event)
            and queue.has_room(0, now)
        ):
            # The same as `_enqueue` for most calls without a policy.
            queue.waiting.add(call_id, "", (now, event))
        else:
            self._enqueue(queue, event, now)
        if queue is queues.open and self._in_turn and self._opened < OPEN_IN_TURN:
            # A probe does not even wait for the next turn.
            self._opened += 1
            at_once += queue.take(1, now)

    def _pass_on(self, events: Sequence[Event]) -> None:
        """Let the library start and cancel calls. An event that it cannot handle stops no other."""
        left, handled = iter(events), 0
        while True:
            try:
                super()._on_events(left)  # type: ignore[arg-type]
            except Exception as error:  # noqa: BLE001 - see above
                position = len(events) - operator.length_hint(left)
                if position == handled:
                    # It failed before it took an event.
                    next(left, None)
                    position += 1
                if position > len(events):
                    return
                self._answer_fault(events[position - 1], error)
                handled = position
            else:
                return

    def _answer_fault(self, event: Event, error: Exception) -> None:
        """Answer a call that could not be handled because of an unexpected error."""
        kind, call_id = event[0], event[1]
        self._queues.remove(call_id)
        self._calls.pop(call_id, None)
        if kind == EVENT_CANCEL:
            # It needs no answer.
            asyncio.get_running_loop().call_exception_handler(
                {"message": "a cancellation was not handled", "exception": error}
            )
            return
        try:
            self._reject_event(event, error)
        except Exception as second:  # noqa: BLE001 - the call needs an answer in any case
            asyncio.get_running_loop().call_exception_handler(
                {"message": "a call was not rejected", "exception": second}
            )
            assert self._front is not None, "it has started"  # noqa: S101 - for the type checker
            code = grpc.StatusCode.INTERNAL.value[0]
            self._front.fail(call_id, code, INTERNAL_MESSAGE, trailing_metadata=[])

    def _enqueue(self, queue: Queue, event: Event, now: float) -> None:
        """Let a call wait, or reject it. Only calls of known callers may wait."""
        if has_malformed_timeout(event):
            self._reject_event(event, TimeoutMalformed())
            return
        caller, rule = "", self._queues.rule_of[event[2]]
        # Without load, handlers refuse small anonymous calls, because they audit their accounts.
        # They would keep a large request until the delayed answer.
        refuses = self._in_turn or queue.waiting.size or len(event[3]) > SMALL_BYTES
        if refuses and self._screen is not None and rule.role is not None:
            try:
                caller = self._screen(event[5][0])
            except LatchkeyError as error:
                self._reject_event(event, error)
                return
        size_bytes = len(event[3])
        if rule.bytes_max < size_bytes <= (self._receive_limit or size_bytes):
            # The handler will see that the request is too large. The rest need not wait for that.
            # The library itself rejects a message above its own limit.
            size_bytes = rule.bytes_max + 1
            event = (*event[:3], event[3][:size_bytes], *event[4:])
        if not queue.has_room(size_bytes, now):
            displaced = queue.waiting.displace(caller)
            if displaced is None:
                self._reject_event(event)
                return
            self._reject_event(displaced[1])
        queue.waiting.add(event[1], caller, (now, event), size_bytes)

    def _forget_cancelled(self, events: Sequence[Event]) -> None:
        """Make sure that calls cancelled just now are neither kept nor started.

        The library keeps each call, with its request, until the call's task removes it. A task that
        is cancelled before its first step never runs. So a client that cancels its calls as soon as
        it has sent them would fill the memory.
        """
        for kind, call_id, *_ in events:
            if kind != EVENT_CANCEL:
                continue
            call = self._calls.get(call_id)
            if call is None:
                # It has not arrived yet, or was rejected.
                self._cancelled[call_id] = None
                if len(self._cancelled) > CANCELLED_MAX:
                    self._cancelled.popitem(last=False)
            elif call.task is not None:
                call.task.add_done_callback(partial(self._forget, call_id))

    def _forget(self, call_id: int, _task: "asyncio.Task[None]") -> None:
        self._calls.pop(call_id, None)

    def _begin_some(self) -> None:
        """Start this turn's share of each queue, and schedule the next turn."""
        self._opened = 0
        if self._begun >= FETCH_AFTER:
            # While the loop is busy, the library's thread seldom runs, and new calls would wait
            # uncounted in the library.
            self._begun = 0
            # This is the turn of the fetched calls: do not start them again from _on_events.
            self._in_turn = True
            assert self._front is not None, "it has started"  # noqa: S101 - for the type checker
            try:
                self._on_events(self._front.recv_batch_details(FETCH_MAX, 0) or ())
            except BaseException:
                # The next turn starts the queued calls.
                asyncio.get_running_loop().call_soon(self._begin_some)
                raise
        share: list[Event] = []
        now = self._monotonic()
        for queue in self._queues.all:
            if queue.waiting.size:
                share += queue.take(self._share_of(queue, now), now)
        self._in_turn = bool(share)
        if share:
            self._begin(share)

    def _begin(self, share: Sequence[Event]) -> None:
        """Start a turn's share, and schedule the next turn."""
        self._in_turn = True
        self._begun += len(share)
        try:
            self._pass_on(share)
        finally:
            # Runs after the first step of the calls just started. It must be scheduled even after
            # an error, or no further call would ever start.
            asyncio.get_running_loop().call_soon(self._begin_some)

    def _share_of(self, queue: Queue, now: float) -> int:
        """Return how many calls of a queue may start in this turn."""
        if queue is self._queues.verifies and now - self._others_at > ALONE_SECONDS:
            return VERIFIES_ALONE
        return queue.in_turn

    def _is_share(self, events: Sequence[Event]) -> bool:
        """Return whether all of these are verifies, and one turn may start them all."""
        verifies, queue_of = self._queues.verifies, self._queues.of_method
        cancelled = self._cancelled
        if len(events) > self._share_of(verifies, self._monotonic()):
            return False
        for event in events:
            if event[0] == EVENT_CANCEL or queue_of[event[2]] is not verifies:
                return False
            if has_malformed_timeout(event) or len(event[3]) > SMALL_BYTES:
                return False
            if cancelled and event[1] in cancelled:
                return False
        return True

    async def _send(self, call: Any, context: Any, response: Any) -> bool:
        """Send a stream's message once its client has room. Return False if the stream closed.

        The library waits in a thread without a limit, and there may be only six threads. Everyone
        may open a health watch: a few clients that do not read would use up all threads.
        """
        data = self._encode(call, context, response)
        if data is None:
            return False
        assert self._front is not None, "it has started"  # noqa: S101 - for the type checker
        context._initial_sent = True  # noqa: SLF001 - the library does this in its own `_send`
        give_up = self._monotonic() + UNREAD_SECONDS
        pause_seconds = ROOM_SECONDS_MIN
        while (sent := self._front.stream_try_send(call.call_id, data)) == STREAM_FULL:
            if self._monotonic() >= give_up:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "The client read nothing.")
            await sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, ROOM_SECONDS_MAX)
        return sent != STREAM_CLOSED

    def _fail(self, call: Any, context: Any, details: str | None) -> None:
        """End a call with the status of its context."""
        context.set_trailing_metadata(sendable(context.trailing_metadata()))
        super()._fail(call, context, details)

    def _reject_event(self, event: Event, error: Exception | None = None) -> None:
        call_id, path, seconds = event[1], self._table[event[2]][0], seconds_left(event)
        status, delay_seconds = self._reject_call(path, seconds, error, peer=event[5][1])

        def fail_late() -> None:
            del self._delayed[call_id]
            fail()

        def fail() -> None:
            assert self._front is not None, "it has started"  # noqa: S101 - for the type checker
            self._front.fail(
                call_id,
                status.code.value[0],
                status.message,
                trailing_metadata=sendable(status.trailing_metadata),
            )

        if delay_seconds and len(self._delayed) < DELAYED_MAX:
            loop = asyncio.get_running_loop()
            self._delayed[call_id] = loop.call_later(delay_seconds, fail_late)
        else:
            fail()


def metadata_of(context: Any) -> Any:
    """Return the metadata of a call as key-value pairs, or None.

    Reads a private attribute. The public method converts all pairs to named tuples first, which
    would cost a Verify more than the rest of its authorization. Streams reach grpcio's part of the
    library, whose contexts lack that attribute.
    """
    try:
        return context._call.metadata  # noqa: SLF001 - see above; the version is pinned
    except AttributeError:
        return context.invocation_metadata()


def sendable(trailing_metadata: Any) -> list[tuple[str, str | bytes]]:
    """Return the metadata without the key at which the library (0.5.0) would drop the answer."""
    return [pair for pair in trailing_metadata if pair[0] != PUSHBACK_METADATA]


def has_malformed_timeout(event: Event) -> bool:
    """Return whether the call has a header `grpc-timeout`, but no deadline."""
    # Without the header, this field contains the peer's address, which is text.
    return event[4].__class__ is bytes and event[5][2] is None
