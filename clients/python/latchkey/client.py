"""`Client`: one method for each RPC of `latchkey.v1`, except Watch, which `Verifier` uses.

This module manages the channel, and applies the deadlines and retries of `_retry`. It does not
cache tokens or verdicts; the Verifier does.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc
from google.protobuf.message import Message
from latchkey_proto.v1 import maintenance_service_pb2 as maintenance_pb
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1.audit_service_pb2_grpc import AuditServiceStub
from latchkey_proto.v1.maintenance_service_pb2_grpc import MaintenanceServiceStub
from latchkey_proto.v1.status_service_pb2_grpc import StatusServiceStub
from latchkey_proto.v1.token_service_pb2_grpc import TokenServiceStub

from latchkey import _audit, _convert, _retry
from latchkey._audit import AuditFilter, AuditPage
from latchkey._channel import check_target, open_channel
from latchkey._status import from_rpc_error
from latchkey.access import Access, Metadata
from latchkey.errors import AccessError, InternalError, LatchkeyError, Unavailable, invalid
from latchkey.models import CreatedToken, Page, Receipt, Scope, Status, Token, Verification
from latchkey.secret import Secret

if TYPE_CHECKING:
    # This class exists only in the stubs' types. At run time one class serves both channel types.
    from latchkey_proto.v1.token_service_pb2_grpc import TokenServiceAsyncStub

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)


class Client:
    """A connection to Latchkey, for one event loop. All tasks of that loop may share it.

    `target` is a gRPC target: "host:port", "dns:///name:port" or "unix:/path". `access` sets TLS
    and the caller's credential. Without it, the environment does (see `latchkey.access`); if that
    is empty too, the connection is plaintext. `credentials` are gRPC channel credentials, in place
    of TLS from `access`. `timeout_seconds` replaces the default deadline of every method, and each
    call can set its own. `options` are gRPC channel arguments, added to the library's or replacing
    them. A `channel` is used as it is, and close() leaves it open.

    The client connects on the first call, so it can be created before the event loop runs. Every
    method raises the errors of `latchkey.errors`.
    """

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

    async def create(
        self,
        account_id: str,
        name: str,
        scope: Scope,
        *,
        expire_time: datetime | None = None,
        ttl: timedelta | None = None,
        labels: Mapping[str, str] | None = None,
        timeout_seconds: float | None = None,
    ) -> CreatedToken:
        """Create a token. Return it with its secret, which is never shown again.

        Give `expire_time` (with a time zone) or `ttl`, or neither for a token that never expires.
        The call is not retried if the answer is lost (Unavailable), since the token may exist.
        Raises AlreadyExists if a live token of the account has the name.
        """
        if expire_time is not None and ttl is not None:
            raise invalid("ttl", "excludes expire_time; give only one")
        if not isinstance(scope, Scope):  # None would request a token without a scope
            raise TypeError(f"scope must be a Scope, not {type(scope).__name__}")

        def request() -> pb.CreateRequest:
            return pb.CreateRequest(
                account_id=account_id,
                name=name,
                scope=_convert.scope_out(scope, "scope"),
                expire_time=(
                    None if expire_time is None else _convert.time_out(expire_time, "expire_time")
                ),
                ttl=None if ttl is None else _convert.duration_out(ttl),
                labels=labels,
            )

        answer = await self._call(
            "Create", self._rpcs().Create, _convert.build(request), timeout_seconds
        )
        return CreatedToken(token=_convert.token_in(answer.token), secret=Secret(answer.secret))

    async def get(
        self, account_id: str, token_id: str, *, timeout_seconds: float | None = None
    ) -> Token:
        """Return a live token. Raises NotFound if the account has no such token."""
        request = _convert.build(lambda: pb.GetRequest(account_id=account_id, id=token_id))
        answer = await self._call("Get", self._rpcs().Get, request, timeout_seconds)
        return _convert.token_in(answer.token)

    async def list_page(
        self,
        account_id: str,
        *,
        page_size: int = 0,
        page_token: str = "",
        timeout_seconds: float | None = None,
    ) -> Page:
        """Return one page of the account's live tokens, newest first.

        With `page_size` 0 the service chooses the size (50). The maximum is 500.
        """
        request = _convert.build(
            lambda: pb.ListRequest(
                account_id=account_id, page_size=page_size, page_token=page_token
            )
        )
        answer = await self._call("List", self._rpcs().List, request, timeout_seconds)
        return _convert.page_in(answer)

    async def list(
        self, account_id: str, *, page_size: int = 0, timeout_seconds: float | None = None
    ) -> AsyncIterator[Token]:
        """Iterate over all of the account's live tokens, newest first.

        Fetches the next page when the previous one is used up. `timeout_seconds` is per page.
        """
        position = ""
        while True:
            page = await self.list_page(
                account_id,
                page_size=page_size,
                page_token=position,
                timeout_seconds=timeout_seconds,
            )
            for token in page.tokens:
                yield token
            if not page.next_page_token:
                return
            if page.next_page_token == position:
                raise InternalError("The service returned the same page of tokens again.")
            position = page.next_page_token

    async def delete(
        self,
        account_id: str,
        token_id: str,
        *,
        no_wait: bool = False,
        timeout_seconds: float | None = None,
    ) -> Receipt:
        """Delete a token for good. After this returns, no verify that starts calls it valid.

        With `no_wait`, for bulk work, it returns as soon as the deletion is stored. Verifies may
        then still call the token valid until a receipt has an effective_time. A later delete() of
        the token waits for that.

        Safe to repeat: deleting a deleted token returns the same receipt. After Unavailable or
        DeadlineExceeded the deletion may be stored but is not confirmed. With the reason
        DELETION_NOT_CONFIRMED it is stored. Raises NotFound if the account never had the token,
        or the record of its deletion has been purged.
        """
        request = _convert.build(
            lambda: pb.DeleteRequest(account_id=account_id, id=token_id, no_wait=no_wait)
        )
        answer = await self._call("Delete", self._rpcs().Delete, request, timeout_seconds)
        return _convert.receipt_in(answer.receipt)

    async def verify(
        self,
        secret: str | Secret,
        required_scope: Scope | None = None,
        *,
        timeout_seconds: float | None = None,
    ) -> Verification:
        """Ask whether `secret` is valid for `required_scope`. None requires no scope.

        The answer is a verdict, whatever was presented. An exception means that there is no safe
        answer, so reject the holder. `Verifier.verify` asks the same, but answers from its cache
        when it can.
        """
        request = _verify_request(secret, required_scope)
        answer = await self._call("Verify", self._rpcs().Verify, request, timeout_seconds)
        return _convert.verification_in(answer)

    async def batch_verify(
        self,
        requests: Iterable[tuple[str | Secret, Scope | None]],
        *,
        timeout_seconds: float | None = None,
    ) -> tuple[Verification, ...]:
        """Verify 1 to 1,000 pairs of secret and required scope at the cost of one look-up.

        The answers come in the order of the questions.
        """
        request = pb.BatchVerifyRequest(
            requests=[_verify_request(secret, scope) for secret, scope in requests]
        )
        answer = await self._call("BatchVerify", self._rpcs().BatchVerify, request, timeout_seconds)
        if len(answer.responses) != len(request.requests):
            # If answers cannot be matched to questions, none of them can be used.
            raise InternalError("The service did not answer every question of a batch.")
        return tuple(_convert.verification_in(response) for response in answer.responses)

    async def invalidate_all(self, *, timeout_seconds: float | None = None) -> Receipt:
        """Empty the cache of every server process and every client library. Changes no token.

        For emergencies, and after a restored backup. Returns when no verifier answers from what it
        had cached before. Safe to repeat.
        """
        method = MaintenanceServiceStub(self._connected()).InvalidateAll
        request = maintenance_pb.InvalidateAllRequest()
        answer = await self._call("InvalidateAll", method, request, timeout_seconds)
        return _convert.receipt_in(answer.receipt)

    async def status(self, *, timeout_seconds: float | None = None) -> Status:
        """Return the state of all server processes, as stored in the database."""
        method = StatusServiceStub(self._connected()).GetStatus
        request = status_pb.GetStatusRequest()
        answer = await self._call("GetStatus", method, request, timeout_seconds)
        return _convert.status_in(answer)

    async def audit_page(
        self,
        wanted: AuditFilter = AuditFilter(),  # noqa: B008 - immutable
        *,
        page_size: int = 0,
        page_token: str = "",
        timeout_seconds: float | None = None,
    ) -> AuditPage:
        """Return one page of management calls, allowed and denied, newest first.

        With `page_size` 0 the service chooses the size (50). The maximum is 500.
        """
        request = _convert.build(lambda: _audit.request_out(wanted, page_size, page_token))
        method = AuditServiceStub(self._connected()).List
        answer = await self._call("AuditService.List", method, request, timeout_seconds)
        return _audit.page_in(answer)

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
        """Close the connection. Calls under way fail with Unavailable. Safe to repeat."""
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
            timeout = _retry.POLICIES[rpc].timeout_seconds

        async def attempt(left_seconds: float) -> ResponseT:
            return await self._attempt(rpc, method, request, left_seconds)

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
            answer = await method(request, timeout=left_seconds, metadata=self._access.metadata())
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


def _verify_request(secret: str | Secret, required_scope: Scope | None) -> pb.VerifyRequest:
    return pb.VerifyRequest(
        secret=_convert.secret_out(secret),
        required_scope=_convert.scope_out(required_scope, "required_scope"),
    )


def _closed_error() -> Unavailable:
    # CANCELLED instead of UNAVAILABLE, because a retry is useless.
    return Unavailable("The client is closed. Create a new one.", code=grpc.StatusCode.CANCELLED)
