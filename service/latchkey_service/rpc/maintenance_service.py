"""The servicer of MaintenanceService: converts between protobuf and `tokens/management.py`.

Owns no rules of its methods.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc
from latchkey_proto.v1 import maintenance_service_pb2 as pb
from latchkey_proto.v1 import maintenance_service_pb2_grpc as pb_grpc

from latchkey_service.audit.audit_log import call_audit_context
from latchkey_service.rpc.admission import release_slot
from latchkey_service.rpc.deadlines import budget_seconds, confirmation_seconds
from latchkey_service.rpc.token_service import put_receipt
from latchkey_service.tokens.management import Tokens

__all__ = ["MaintenanceService"]

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[object, object]


class MaintenanceService(pb_grpc.MaintenanceServiceServicer):
    """Serves latchkey.v1.MaintenanceService. The .proto documents the methods."""

    def __init__(self, tokens: Tokens, clock: Callable[[], float]) -> None:
        self._tokens = tokens
        self._clock = clock

    async def InvalidateAll(
        self, request: pb.InvalidateAllRequest, context: "Context"
    ) -> pb.InvalidateAllResponse:
        now = self._clock()
        deletion = await self._tokens.invalidate_all(
            now + confirmation_seconds(context),
            call_audit_context.get(),
            now + budget_seconds(context),
            on_wait=release_slot,
        )
        response = pb.InvalidateAllResponse()
        put_receipt(deletion, response.receipt)
        return response
