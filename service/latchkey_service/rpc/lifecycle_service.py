"""The methods of TokenService that change existing tokens: converts, makes one call, converts back.

The other methods are in `token_service.py`, except Verify and BatchVerify.
"""

from typing import TYPE_CHECKING

import grpc
from latchkey_proto.v1 import token_service_pb2 as pb

from latchkey_service.rpc.managed_calls import current_call
from latchkey_service.rpc.token_service import (
    TokenService,
    call_of,
    put_receipt,
    to_datetime,
    to_filter,
    to_timedelta,
)
from latchkey_service.rpc.verify_calls import put_token
from latchkey_service.tokens.changes import NewValues
from latchkey_service.tokens.lifecycle import Rotation

__all__ = ["FullTokenService"]

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[object, object]


class FullTokenService(TokenService):
    """Serves latchkey.v1.TokenService, except Verify and BatchVerify. The .proto documents it."""

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
        call = call_of(current_call.get(), wait=not request.no_wait)
        record, receipt = await self._lifecycle.update(request.account_id, request.id, new, call)
        response = pb.UpdateResponse()
        put_token(record, response.token)
        if receipt is not None:
            put_receipt(receipt, response.receipt)
        return response

    async def Disable(self, request: pb.DisableRequest, context: "Context") -> pb.DisableResponse:
        call = call_of(current_call.get(), wait=not request.no_wait)
        record, receipt = await self._lifecycle.disable(request.account_id, request.id, call)
        response = pb.DisableResponse()
        put_token(record, response.token)
        put_receipt(receipt, response.receipt)
        return response

    async def Enable(self, request: pb.EnableRequest, context: "Context") -> pb.EnableResponse:
        call = call_of(current_call.get(), wait=False)
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
        call = call_of(current_call.get(), wait=not request.no_wait)
        rotated = await self._lifecycle.rotate(rotation, call)
        response = pb.RotateResponse(secret=rotated.secret.reveal())
        put_token(rotated.record, response.token)
        if rotated.receipt is not None:
            put_receipt(rotated.receipt, response.receipt)
        return response

    async def RetireSecrets(
        self, request: pb.RetireSecretsRequest, context: "Context"
    ) -> pb.RetireSecretsResponse:
        call = call_of(current_call.get(), wait=not request.no_wait)
        record, receipt = await self._lifecycle.retire_secrets(request.account_id, request.id, call)
        response = pb.RetireSecretsResponse()
        put_token(record, response.token)
        put_receipt(receipt, response.receipt)
        return response

    async def RevokeSecret(
        self, request: pb.RevokeSecretRequest, context: "Context"
    ) -> pb.RevokeSecretResponse:
        call = call_of(current_call.get(), wait=not request.no_wait)
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
        call = call_of(current_call.get(), wait=not request.no_wait)
        deletions = await self._bulk.delete_all(
            request.account_id, to_filter(request.filter), call, dry_run=request.dry_run
        )
        response = pb.DeleteAllResponse(count=deletions.count, more=deletions.more)
        for record in deletions.records:
            put_token(record, response.tokens.add())
        if deletions.receipt is not None:
            put_receipt(deletions.receipt, response.receipt)
        return response
