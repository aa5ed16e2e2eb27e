"""The connection of a `Client`: its channel, and how it makes a call.

This module owns the channel, the caller's credential, deadlines and retries. It does not know what
the methods mean.
"""

import asyncio
from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar
from urllib.parse import quote

import grpc
from google.protobuf.message import Message
from latchkey_proto.v1.token_service_pb2_grpc import TokenServiceStub

from latchkey import _retry, _tracing
from latchkey._channel import check_target, open_channel
from latchkey._status import from_rpc_error
from latchkey.access import Access, Metadata
from latchkey.errors import AccessError, InternalError, LatchkeyError, Unavailable

if TYPE_CHECKING:
    # This class exists only in the stubs' types. At run time one class serves both channel types.
    from latchkey_proto.v1.token_service_pb2_grpc import TokenServiceAsyncStub

__all__ = ["Connection", "current_person"]

current_person: ContextVar[str | None] = ContextVar("latchkey_person", default=None)
"""The person for whom the current task or thread makes calls, such as an e-mail address.

The service writes it into its audit log, if the policy trusts this caller to report people.
"""
# Percent-encoded, because metadata is ASCII.
_PERSON: Final = "x-latchkey-person"
# The service ignores longer names.
_PERSON_LENGTH_MAX: Final = 128

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)


class Connection:
    """Calls methods of the service, for one event loop. `Client` describes the arguments."""

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        timeout_seconds: float | None = None,
        access: Access | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        channel: grpc.aio.Channel | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        if access is None:
            # A channel, or gRPC credentials, already determine how to connect.
            own = channel is not None or credentials is not None
            access = Access() if own else Access.from_environment()
        elif credentials is not None and access.channel_credentials is not None:
            raise AccessError("credentials and access with TLS exclude each other")
        if credentials is None:
            credentials = access.channel_credentials
            if channel is None:
                access.check_target(target)
        check_target(target)
        self._access = access
        self._target = target
        self._timeout_seconds = _retry.checked_timeout(timeout_seconds)
        self._credentials = credentials
        self._options = tuple(options)
        self._channel = channel
        self._owns_channel = channel is None
        self._stub: TokenServiceAsyncStub | None = None
        self._budget = _retry.Budget()
        self._closed = False

    def metadata(self) -> Metadata:
        """Return the metadata for each call. For the library's own use."""
        return self._access.metadata()

    def open_channel(self) -> tuple[grpc.aio.Channel, bool]:
        """Return a channel to the same target, and whether the caller has to close it.

        The caller has to close a new channel, but not one that was passed to `Client(channel=…)`.
        For the library's own use.
        """
        if self._closed:
            raise _closed_error()
        if not self._owns_channel and self._channel is not None:
            return self._channel, False
        return open_channel(self._target, self._credentials, self._options), True

    async def close(self) -> None:
        """Close the connection. Calls in progress fail with Unavailable. Safe to repeat."""
        self._closed = True
        channel, self._channel = self._channel, None
        self._stub = None
        if channel is not None and self._owns_channel:
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _rpcs(self) -> "TokenServiceAsyncStub":
        if self._stub is None:
            self._stub = TokenServiceStub(self._connected())
        return self._stub

    def _connected(self) -> grpc.aio.Channel:
        """Return the channel. Raises Unavailable if the client is closed."""
        if self._closed:
            raise _closed_error()
        if self._channel is None:
            # Not in __init__: a channel belongs to the event loop that runs when it is created.
            self._channel = open_channel(self._target, self._credentials, self._options)
        return self._channel

    async def _call(
        self,
        rpc: str,
        method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT],
        request: RequestT,
        timeout_seconds: float | None,
    ) -> ResponseT:
        """Call `method` with deadline and retries, and translate its errors."""
        timeout = _retry.checked_timeout(timeout_seconds)
        if timeout is None:
            timeout = self._timeout_seconds
        if timeout is None:
            timeout = _retry.TIMEOUTS_SECONDS[rpc]

        async def attempt(left_seconds: float) -> ResponseT:
            return await self._attempt(rpc, method, request, left_seconds)

        with _tracing.call(rpc):
            return await _retry.run(rpc, attempt, timeout_seconds=timeout, budget=self._budget)

    async def _attempt(
        self,
        rpc: str,
        method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT],
        request: RequestT,
        left_seconds: float,
    ) -> ResponseT:
        answer: ResponseT | None = None
        failure: LatchkeyError
        try:
            metadata = (*self._access.metadata(), *_tracing.metadata())
            if (person := current_person.get()) is not None:
                metadata = (*metadata, (_PERSON, quote(person[:_PERSON_LENGTH_MAX])))
            answer = await method(request, timeout=left_seconds, metadata=metadata)
            # grpc returns None, and logs, if it cannot parse a message.
            failure = InternalError(f"{rpc} failed: the service's answer could not be parsed.")
        except grpc.aio.AioRpcError as error:
            failure = from_rpc_error(rpc, error)
        except grpc.aio.UsageError:
            failure = _closed_error()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._closed or task is None or task.cancelling():
                raise
            # Closing the channel cancels its calls, although nobody cancelled this task.
            failure = _closed_error()
        if answer is None:
            # Raised outside the handler, so that no traceback prints the original error.
            raise failure
        return answer


def _closed_error() -> Unavailable:
    # CANCELLED instead of UNAVAILABLE, because a retry is useless.
    return Unavailable("The client is closed. Create a new one.", code=grpc.StatusCode.CANCELLED)
