"""`Client`: one method for each RPC of `latchkey.v1`, except Watch, which `Verifier` uses.

`_connection` makes the calls, and `_lifecycle` contains the methods that change existing tokens.
None of them caches tokens or verdicts; the Verifier does.
"""

from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from datetime import datetime, timedelta
from uuid import UUID, uuid4

from latchkey_proto.v1 import maintenance_service_pb2 as maintenance_pb
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1.audit_service_pb2_grpc import AuditServiceStub
from latchkey_proto.v1.maintenance_service_pb2_grpc import MaintenanceServiceStub
from latchkey_proto.v1.status_service_pb2_grpc import StatusServiceStub

from latchkey import _audit, _convert, _rate_messages
from latchkey._audit import AuditFilter, AuditPage
from latchkey._filters import check_applied, filter_out, order_out
from latchkey._lifecycle import LifecycleCalls
from latchkey._rate_limit import RateLimit
from latchkey.errors import InternalError, invalid
from latchkey.filters import TokenFilter, TokenOrder
from latchkey.models import (
    CallerUsage,
    CreatedToken,
    FoundPage,
    Limits,
    Page,
    Receipt,
    Scope,
    Status,
    Token,
    Verification,
)
from latchkey.secret import Secret


class Client(LifecycleCalls):
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

    async def create(
        self,
        account_id: str,
        name: str,
        scope: Scope,
        *,
        expire_time: datetime | None = None,
        ttl: timedelta | None = None,
        labels: Mapping[str, str] | None = None,
        description: str = "",
        allowed_networks: Iterable[str] = (),
        permissions: Iterable[str] = (),
        rate_limit: RateLimit | None = None,
        request_id: UUID | None = None,
        timeout_seconds: float | None = None,
    ) -> CreatedToken:
        """Create a token. Return it with its secret, which is never shown again.

        Give `expire_time` (with a time zone) or `ttl`, or neither for a token that never expires.
        `allowed_networks` are networks in CIDR notation, or single addresses, from which the token
        may be used. `permissions` are of the form `resource:action`, or `resource:*`. `rate_limit`
        limits how often all verifiers together call the token valid.

        If an answer is lost, the library sends the same `request_id` again. The service then
        returns the same token with another secret, and the lost one no longer works. If the call
        raises Unavailable, the token may exist nevertheless, unless the error says `unsent`. To
        try again, pass a `request_id` of your own, the same each time, within a day. By default,
        each call has a new one. Raises AlreadyExists if a live token of the account has the name,
        and InvalidArgument with the reason EXPIRY_REQUIRED or EXPIRY_TOO_LATE if the expiry exceeds
        the limit that `get_limits` returns.
        """
        if expire_time is not None and ttl is not None:
            raise invalid("ttl", "cannot be given together with expire_time")
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
                description=description,
                allowed_networks=_convert.several(allowed_networks, "allowed_networks"),
                permissions=_convert.several(permissions, "permissions"),
                rate_limit=None
                if rate_limit is None
                else _rate_messages.rate_limit_out(rate_limit),
                request_id=str(request_id or uuid4()),
            )

        answer = await self._call(
            "Create", self._rpcs().Create, _convert.build(request), timeout_seconds
        )
        return CreatedToken(
            token=_convert.token_in(answer.token),
            secret=Secret(answer.secret),
            receipt=_convert.receipt_of(answer),
        )

    async def get(
        self, account_id: str, token_id: str, *, timeout_seconds: float | None = None
    ) -> Token:
        """Return a live token. Raises NotFound if the account has no such token."""
        request = _convert.build(lambda: pb.GetRequest(account_id=account_id, id=token_id))
        answer = await self._call("Get", self._rpcs().Get, request, timeout_seconds)
        return _convert.token_in(answer.token)

    async def get_usage(
        self, account_id: str, token_id: str, *, timeout_seconds: float | None = None
    ) -> tuple[CallerUsage, ...]:
        """Return who used a live token, the most recent caller first. Raises NotFound.

        Includes all uses that are more than 15 seconds old, if all servers are healthy.
        """
        request = _convert.build(lambda: pb.GetUsageRequest(account_id=account_id, id=token_id))
        answer = await self._call("GetUsage", self._rpcs().GetUsage, request, timeout_seconds)
        return _convert.usage_in(answer)

    async def find(
        self,
        *,
        token_id: str = "",
        hint: str = "",
        page_size: int = 0,
        page_token: str = "",
        timeout_seconds: float | None = None,
    ) -> FoundPage:
        """Find tokens in all accounts, for operators. Give either `token_id` or `hint`.

        `hint` is the last four characters of a secret, or its whole hint. The newest token comes
        first. Includes disabled, expired and deleted tokens, the latter until their records are
        purged. With a `token_id`, the answer says who used the token. With `page_size` 0 the
        service chooses the size (50). The maximum is 100.
        """
        request = _convert.build(
            lambda: pb.FindRequest(
                id=token_id, hint=hint, page_size=page_size, page_token=page_token
            )
        )
        answer = await self._call("Find", self._rpcs().Find, request, timeout_seconds)
        return _convert.found_in(answer)

    async def get_limits(self, account_id: str, *, timeout_seconds: float | None = None) -> Limits:
        """Return the limits for an account's tokens that this caller creates or changes."""
        request = _convert.build(lambda: pb.GetLimitsRequest(account_id=account_id))
        answer = await self._call("GetLimits", self._rpcs().GetLimits, request, timeout_seconds)
        return _convert.limits_in(answer)

    async def list_page(
        self,
        account_id: str,
        wanted: TokenFilter = TokenFilter(),  # noqa: B008 - immutable
        *,
        order: TokenOrder = TokenOrder.NEWEST,
        reverse: bool = False,
        include_total_size: bool = False,
        page_size: int = 0,
        page_token: str = "",
        timeout_seconds: float | None = None,
    ) -> Page:
        """Return one page of the account's live tokens that match `wanted`, in an order.

        With `page_size` 0 the service chooses the size (50). The maximum is 500. A page can be
        shorter, or empty, without being the last one: the service examines at most 10,000 tokens
        for each. A `page_token` belongs to its account, filter and order. Raises FailedPrecondition
        if the server is of a release that cannot filter, order or count.
        """

        def request() -> pb.ListRequest:
            message = pb.ListRequest(
                account_id=account_id,
                page_size=page_size,
                page_token=page_token,
                reverse=reverse,
                include_total_size=include_total_size,
            )
            # Absent where they are the default, for servers that do not know them.
            if wanted != TokenFilter():
                message.filter.CopyFrom(filter_out(wanted))
            if order is not TokenOrder.NEWEST:
                message.order = order_out(order)
            return message

        built = _convert.build(request)
        answer = await self._call("List", self._rpcs().List, built, timeout_seconds)
        check_applied(built, answer)
        return _convert.page_in(answer, counted=include_total_size)

    async def list(
        self,
        account_id: str,
        wanted: TokenFilter = TokenFilter(),  # noqa: B008 - immutable
        *,
        order: TokenOrder = TokenOrder.NEWEST,
        reverse: bool = False,
        page_size: int = 0,
        timeout_seconds: float | None = None,
    ) -> AsyncIterator[Token]:
        """Iterate over all of the account's live tokens that match `wanted`, in an order.

        Fetches the next page when the previous one is used up. `timeout_seconds` is per page.
        """
        position = ""
        while True:
            page = await self.list_page(
                account_id,
                wanted,
                order=order,
                reverse=reverse,
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
        client_address: str = "",
        required_permissions: Collection[str] = (),
        timeout_seconds: float | None = None,
    ) -> Verification:
        """Ask whether `secret` is valid for `required_scope`. None requires no scope.

        `client_address` is the IP address of the holder's client. Tokens that are limited to
        networks need it. `required_permissions` are of the form `resource:action`.

        The answer is a verdict for any presented string. An exception means that there is no safe
        answer, so reject the holder. `Verifier.verify` asks the same, but answers from its cache
        when it can.
        """
        request = _verify_request(secret, required_scope, client_address, required_permissions)
        answer = await self._call("Verify", self._rpcs().Verify, request, timeout_seconds)
        return _convert.verification_in(answer)

    async def batch_verify(
        self,
        requests: Iterable[
            tuple[str | Secret, Scope | None]
            | tuple[str | Secret, Scope | None, str, Collection[str]]
        ],
        *,
        omit_details: bool = False,
        timeout_seconds: float | None = None,
    ) -> tuple[Verification, ...]:
        """Verify 1 to 1,000 pairs of secret and required scope at the cost of one look-up.

        A pair may be followed by the client's address and the required permissions. The answers
        come in the order of the questions. With `omit_details`, their tokens lack labels, networks
        and permissions. If the complete tokens would take more than 4 MiB, some lack them in any
        case. `Verification.details_omitted` says so.
        """
        request = pb.BatchVerifyRequest(
            requests=[_verify_request(*question) for question in requests],
            omit_details=omit_details,
        )
        answer = await self._call("BatchVerify", self._rpcs().BatchVerify, request, timeout_seconds)
        if len(answer.responses) != len(request.requests):
            # If answers cannot be matched to questions, none of them can be used.
            raise InternalError("The service did not answer every question of a batch.")
        return tuple(_convert.verification_in(response) for response in answer.responses)

    async def invalidate_all(self, *, timeout_seconds: float | None = None) -> Receipt:
        """Empty the cache of every server process and every client library. Changes no token.

        For emergencies, and after a restored backup. Returns when no verifier can still use an
        answer that it cached before the call. Safe to repeat.
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


def _verify_request(
    secret: str | Secret,
    required_scope: Scope | None,
    client_address: str = "",
    required_permissions: Collection[str] = (),
) -> pb.VerifyRequest:
    return _convert.build(
        lambda: pb.VerifyRequest(
            secret=_convert.secret_out(secret),
            required_scope=_convert.scope_out(required_scope, "required_scope"),
            client_address=client_address,
            required_permissions=required_permissions,
            spends_shares=True,
        )
    )
