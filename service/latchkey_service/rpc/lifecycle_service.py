"""The methods of TokenService that change existing tokens: converts, makes one call, converts back.

A part of `token_service.py`, which registers them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc
from latchkey_proto.v1 import token_service_pb2 as pb

from latchkey_service.audit.audit_log import call_audit_context
from latchkey_service.rpc.admission import release_slot
from latchkey_service.rpc.deadlines import budget_seconds, confirmation_seconds
from latchkey_service.rpc.messages import put_receipt, put_token, to_datetime, to_timedelta
from latchkey_service.tokens.bulk import Bulk
from latchkey_service.tokens.bulk_store import Filter
from latchkey_service.tokens.changes import NewValues
from latchkey_service.tokens.confirmation import Call
from latchkey_service.tokens.lifecycle import Lifecycle, Rotation

__all__ = ["LifecycleMethods", "call_of"]

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[object, object]


class LifecycleMethods:
    """Serves a part of latchkey.v1.TokenService. The .proto documents the methods."""

    _lifecycle: Lifecycle
    _bulk: Bulk
    _clock: Callable[[], float]

    async def Update(self, request: pb.UpdateRequest, context: "Context") -> pb.UpdateResponse:
        token = request.token
        expire_time = None
        if token.HasField("expire_time"):
            expire_time = to_datetime("token.expire_time", token.expire_time)
        new = NewValues(
            request.update_mask.paths,
            token.name,
            token.scope,
            expire_time,
            token.labels,
            token.description,
            token.allowed_networks,
            token.permissions,
        )
        call = call_of(self._clock(), context, wait=not request.no_wait)
        record, receipt = await self._lifecycle.update(request.account_id, request.id, new, call)
        response = pb.UpdateResponse()
        put_token(record, response.token)
        if receipt is not None:
            put_receipt(receipt, response.receipt)
        return response

    async def Disable(self, request: pb.DisableRequest, context: "Context") -> pb.DisableResponse:
        call = call_of(self._clock(), context, wait=not request.no_wait)
        record, receipt = await self._lifecycle.disable(request.account_id, request.id, call)
        response = pb.DisableResponse()
        put_token(record, response.token)
        put_receipt(receipt, response.receipt)
        return response

    async def Enable(self, request: pb.EnableRequest, context: "Context") -> pb.EnableResponse:
        call = call_of(self._clock(), context, wait=False)
        record = await self._lifecycle.enable(request.account_id, request.id, call)
        response = pb.EnableResponse()
        put_token(record, response.token)
        return response

    async def Rotate(self, request: pb.RotateRequest, context: "Context") -> pb.RotateResponse:
        rotation = Rotation(
            request.account_id,
            request.id,
            to_timedelta("grace", request.grace) if request.HasField("grace") else None,
            request.retire_on_first_use,
            request.request_id,
        )
        call = call_of(self._clock(), context, wait=not request.no_wait)
        rotated = await self._lifecycle.rotate(rotation, call)
        response = pb.RotateResponse(secret=rotated.secret.reveal())
        put_token(rotated.record, response.token)
        if rotated.receipt is not None:
            put_receipt(rotated.receipt, response.receipt)
        return response

    async def RetireSecrets(
        self, request: pb.RetireSecretsRequest, context: "Context"
    ) -> pb.RetireSecretsResponse:
        call = call_of(self._clock(), context, wait=not request.no_wait)
        record, receipt = await self._lifecycle.retire_secrets(request.account_id, request.id, call)
        response = pb.RetireSecretsResponse()
        put_token(record, response.token)
        put_receipt(receipt, response.receipt)
        return response

    async def RevokeSecret(
        self, request: pb.RevokeSecretRequest, context: "Context"
    ) -> pb.RevokeSecretResponse:
        call = call_of(self._clock(), context, wait=not request.no_wait)
        outcomes, receipt = await self._bulk.revoke_secrets(request.secrets, call)
        response = pb.RevokeSecretResponse()
        for outcome in outcomes:
            response.results.add(outcome=pb.SecretOutcome.ValueType(outcome))
        if receipt is not None:
            put_receipt(receipt, response.receipt)
        return response

    async def DeleteAll(
        self, request: pb.DeleteAllRequest, context: "Context"
    ) -> pb.DeleteAllResponse:
        call = call_of(self._clock(), context, wait=not request.no_wait)
        deletions = await self._bulk.delete_all(
            request.account_id, _filter(request.filter), call, dry_run=request.dry_run
        )
        response = pb.DeleteAllResponse(count=deletions.count, more=deletions.more)
        for record in deletions.records:
            put_token(record, response.tokens.add())
        if deletions.receipt is not None:
            put_receipt(deletions.receipt, response.receipt)
        return response


def call_of(now: float, context: "Context", *, wait: bool = True) -> Call:
    """Return the call that `context` belongs to. `now` is the process's clock."""
    return Call(
        call_audit_context.get(),
        now + budget_seconds(context),
        now + confirmation_seconds(context) if wait else None,
        # Waiting for verifiers uses nothing that other calls need.
        release_slot,
    )


def _filter(message: pb.TokenFilter) -> Filter:
    expires_before = unused_since = None
    if message.HasField("expires_before"):
        expires_before = to_datetime("filter.expires_before", message.expires_before)
    if message.HasField("unused_since"):
        unused_since = to_datetime("filter.unused_since", message.unused_since)
    return Filter(
        message.scope,
        message.name_contains,
        message.label,
        message.state,
        expires_before,
        unused_since,
        message.can_write if message.HasField("can_write") else None,
    )
