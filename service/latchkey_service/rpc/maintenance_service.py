"""The servicer of MaintenanceService: converts between protobuf and `tokens/management.py`.

Owns no rules of its methods.
"""

from typing import TYPE_CHECKING

import grpc
from latchkey_proto.v1 import maintenance_service_pb2 as pb
from latchkey_proto.v1 import maintenance_service_pb2_grpc as pb_grpc

from latchkey_service.rpc.managed_calls import current_call
from latchkey_service.rpc.token_service import put_receipt
from latchkey_service.tokens.management import Tokens

__all__ = ["MaintenanceService"]

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[object, object]


class MaintenanceService(pb_grpc.MaintenanceServiceServicer):
    """Serves latchkey.v1.MaintenanceService. The .proto documents the methods."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def InvalidateAll(
        self, request: pb.InvalidateAllRequest, context: "Context"
    ) -> pb.InvalidateAllResponse:
        call = current_call.get()
        deletion = await self._tokens.invalidate_all(
            call.confirm_by,
            call.audit_context,
            call.deadline,
            on_commit=call.committed,
            on_wait=call.release_slot,
        )
        response = pb.InvalidateAllResponse()
        put_receipt(deletion, response.receipt)
        return response
