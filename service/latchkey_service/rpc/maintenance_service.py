"""The servicer of MaintenanceService: converts between protobuf and `tokens/management.py`.

Owns no rules of its methods.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import grpc
from latchkey_proto.v1 import maintenance_service_pb2 as pb
from latchkey_proto.v1 import maintenance_service_pb2_grpc as pb_grpc

from latchkey_service.rpc.managed_calls import current_call
from latchkey_service.rpc.token_service import put_receipt
from latchkey_service.tokens.management import Tokens

__all__ = ["PAUSE_SECONDS", "MaintenanceService"]

# Between the starts of two calls of InvalidateAll in a worker. Each interrupts the reads in
# progress, and a verify fails whose read is interrupted several times in a row: without a pause, an
# operator that calls in a loop made a fifth of all verifies fail. Operators have two slots, so a
# call waits for two pauses at most.
PAUSE_SECONDS: Final = 0.25

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[object, object]


class MaintenanceService(pb_grpc.MaintenanceServiceServicer):
    """Serves latchkey.v1.MaintenanceService. The .proto documents the methods."""

    def __init__(
        self,
        tokens: Tokens,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._tokens = tokens
        self._monotonic = monotonic
        self._sleep = sleep
        self._next_at = -math.inf

    async def InvalidateAll(
        self, request: pb.InvalidateAllRequest, context: "Context"
    ) -> pb.InvalidateAllResponse:
        call = current_call.get()
        now = self._monotonic()
        at = max(now, self._next_at)
        self._next_at = at + PAUSE_SECONDS
        if at > now:
            await self._sleep(at - now)
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
