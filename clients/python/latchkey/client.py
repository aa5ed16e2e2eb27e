"""`Client`: one method for each RPC of `latchkey.v1`, but for Watch, which is the Verifier's.

It owns the channel, and deadlines and retries by `_retry`. It remembers nothing about tokens:
answers from memory are the Verifier's affair.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from types import TracebackType
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
from latchkey._channel import open_channel
from latchkey._status import from_rpc_error
from latchkey.access import Access, Metadata
from latchkey.errors import AccessError, InternalError, LatchkeyError, Unavailable, invalid
from latchkey.models import CreatedToken, Page, Receipt, Scope, Status, Token, Verification
from latchkey.secret import Secret

if TYPE_CHECKING:
    # Exists in the stubs' types only; at run time one class serves both kinds of channel.
    from latchkey_proto.v1.audit_service_pb2_grpc import AuditServiceAsyncStub
    from latchkey_proto.v1.maintenance_service_pb2_grpc import MaintenanceServiceAsyncStub
    from latchkey_proto.v1.status_service_pb2_grpc import StatusServiceAsyncStub
    from latchkey_proto.v1.token_service_pb2_grpc import TokenServiceAsyncStub

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)


class Client:
    """A connection to Latchkey, for one event loop. Safe to share between its tasks.

    `target` is what gRPC takes: "host:port", "dns:///name:port", "unix:/path". `access` says how
    to use TLS and who calls; without it the environment does (`latchkey.access`), and if that says
    nothing the connection is plaintext. `credentials` are gRPC's own, in place of TLS by `access`.
    `timeout_seconds` replaces the default deadline of
    every method; each call can say its own. `options` are gRPC channel arguments that replace or
    join the library's. With `channel`, that one is used as it is, and stays open on close().

    It connects with the first call, so it may be made before the event loop runs. Every method
    raises an error of the tree in `latchkey.errors`.
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
            # Who brings a channel, or gRPC's credentials, has chosen already.
            own = channel is not None or credentials is not None
            access = Access() if own else Access.from_environment()
        elif credentials is not None and access.channel_credentials is not None:
            raise AccessError("credentials and access with TLS exclude each other")
        if credentials is None:
            credentials = access.channel_credentials
            if channel is None:
                access.check_target(target)
        self._access = access
        self._target = target
        self._timeout_seconds = _retry.checked_timeout(timeout_seconds)
        self._credentials = credentials
        self._options = tuple(options)
        self._channel = channel
        self._owns_channel = channel is None
        self._stub: TokenServiceAsyncStub | None = None
        self._status_stub: StatusServiceAsyncStub | None = None
        self._maintenance_stub: MaintenanceServiceAsyncStub | None = None
        self._audit_stub: AuditServiceAsyncStub | None = None
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
        """Create a token and return it with its secret, which is never shown again.

        `expire_time` (with a time zone) and `ttl` exclude each other; with neither, it never
        expires. When the answer is lost (Unavailable) the token may exist, and it is not tried
        again by itself. Raises AlreadyExists when a live token of the account has the name.
        """
        if expire_time is not None and ttl is not None:
            raise invalid("ttl", "excludes expire_time; give one of them")
        if not isinstance(scope, Scope):  # None would ask for no scope
            raise TypeError(f"scope is a Scope, not {type(scope).__name__}")

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
        """Return a live token. Raises NotFound when the account has no such token."""
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

        `page_size` 0 leaves it to the service (50); it gives at most 500.
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

        A page is fetched when the one before is used up; `timeout_seconds` is for each of them.
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
                raise InternalError("The service keeps answering with the same page of tokens.")
            position = page.next_page_token

    async def delete(
        self,
        account_id: str,
        token_id: str,
        *,
        no_wait: bool = False,
        timeout_seconds: float | None = None,
    ) -> Receipt:
        """Delete a token for good. Once this returns, no verify that starts calls it valid.

        With `no_wait` it returns as soon as the deletion is stored, for bulk work: then verifies
        may call it valid until the receipt has an effective_time, which a later delete() of the
        token waits for.

        Safe to repeat: a deleted token's deletion answers with the same receipt. After
        Unavailable or DeadlineExceeded the deletion may stand, but is not confirmed; it does stand
        if the reason is DELETION_NOT_CONFIRMED. Raises NotFound when the account never had the
        token.
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
        """Ask whether `secret` may do what needs `required_scope`; None needs none.

        Whatever was presented, the answer is a verdict. Any exception means: no safe answer, so
        not allowed. `Verifier.verify` asks the same and spares the service what it can.
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
        """Ask about 1-1,000 pairs of secret and required scope at the cost of one look-up.

        The answers come in the order of the questions.
        """
        request = pb.BatchVerifyRequest(
            requests=[_verify_request(secret, scope) for secret, scope in requests]
        )
        answer = await self._call("BatchVerify", self._rpcs().BatchVerify, request, timeout_seconds)
        if len(answer.responses) != len(request.requests):
            # Answers that cannot be matched to questions answer none of them.
            raise InternalError("The service did not answer every question of a batch.")
        return tuple(_convert.verification_in(response) for response in answer.responses)

    async def invalidate_all(self, *, timeout_seconds: float | None = None) -> Receipt:
        """Empty the memory of every server process and every client library. Changes no token.

        For emergencies, and after the database was restored. Returns when no verifier answers from
        what it remembered before. Safe to retry.
        """
        if self._maintenance_stub is None:
            self._maintenance_stub = MaintenanceServiceStub(self._connected())
        method = self._maintenance_stub.InvalidateAll
        request = maintenance_pb.InvalidateAllRequest()
        answer = await self._call("InvalidateAll", method, request, timeout_seconds)
        return _convert.receipt_in(answer.receipt)

    async def status(self, *, timeout_seconds: float | None = None) -> Status:
        """Return the state of all server processes, as the database has it."""
        method = self._rpcs_of_status().GetStatus
        request = status_pb.GetStatusRequest()
        answer = await self._call("GetStatus", method, request, timeout_seconds)
        return _convert.status_in(answer)

    async def audit_page(
        self,
        wanted: AuditFilter = AuditFilter(),  # noqa: B008 - it does not change
        *,
        page_size: int = 0,
        page_token: str = "",
        timeout_seconds: float | None = None,
    ) -> AuditPage:
        """Return one page of who has managed tokens, or tried to, newest first.

        `page_size` 0 leaves it to the service (50); it gives at most 500.
        """
        request = _convert.build(lambda: _audit.request_out(wanted, page_size, page_token))
        if self._audit_stub is None:
            self._audit_stub = AuditServiceStub(self._connected())
        answer = await self._call(
            "AuditService.List", self._audit_stub.List, request, timeout_seconds
        )
        return _audit.page_in(answer)

    def metadata(self) -> Metadata:
        """Return what is sent with each call. For the library's own use."""
        return self._access.metadata()

    def open_channel(self) -> tuple[grpc.aio.Channel, bool]:
        """Return a channel to the same place, and whether it is new and the caller's to close.

        For the library's own use. Not new is only the `channel` that the client was made with.
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
        self._stub = self._status_stub = self._audit_stub = self._maintenance_stub = None
        if channel is not None and self._owns_channel:
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _rpcs(self) -> "TokenServiceAsyncStub":
        if self._stub is None:
            self._stub = TokenServiceStub(self._connected())
        return self._stub

    def _rpcs_of_status(self) -> "StatusServiceAsyncStub":
        if self._status_stub is None:
            self._status_stub = StatusServiceStub(self._connected())
        return self._status_stub

    def _connected(self) -> grpc.aio.Channel:
        """Return the channel. Raises Unavailable when the client is closed."""
        if self._closed:
            raise _closed_error()
        if self._channel is None:
            # Not in __init__: a channel belongs to the loop that runs when it is made.
            self._channel = open_channel(self._target, self._credentials, self._options)
        return self._channel

    async def _call(
        self,
        rpc: str,
        method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT],
        request: RequestT,
        timeout_seconds: float | None,
    ) -> ResponseT:
        """Call `method` with deadline and retries, and translate what goes wrong."""
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
            # grpc answers None, and logs, when it could not parse what came.
            failure = InternalError(f"{rpc} failed: the service's answer could not be read.")
        except grpc.aio.AioRpcError as error:
            failure = from_rpc_error(rpc, error)
        except grpc.aio.UsageError:
            failure = _closed_error()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._closed or task is None or task.cancelling():
                raise
            # Closing the channel cancels its calls, but nobody cancelled this task.
            failure = _closed_error()
        if answer is None:
            # Raised out here so that no traceback prints the original (`from_rpc_error`).
            raise failure
        return answer


def _verify_request(secret: str | Secret, required_scope: Scope | None) -> pb.VerifyRequest:
    return pb.VerifyRequest(
        secret=_convert.secret_out(secret),
        required_scope=_convert.scope_out(required_scope, "required_scope"),
    )


def _closed_error() -> Unavailable:
    # With a code of its own, for it is no use to try again.
    return Unavailable("The client is closed. Make a new one.", code=grpc.StatusCode.CANCELLED)
