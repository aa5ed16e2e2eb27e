"""StatusService: protobuf → table → protobuf."""

from typing import TYPE_CHECKING

import grpc
from google.protobuf import duration_pb2
from latchkey_proto.v1 import status_service_pb2 as pb
from latchkey_proto.v1 import status_service_pb2_grpc as pb_grpc

from latchkey_service.coherence.table import VerifierTable

__all__ = ["StatusService"]

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[object, object]


class StatusService(pb_grpc.StatusServiceServicer):
    """latchkey.v1.StatusService. What it tells is said in the .proto."""

    def __init__(self, table: VerifierTable, own_id: str) -> None:
        self._table = table
        self._own_id = own_id

    async def GetStatus(
        self, request: pb.GetStatusRequest, context: "Context"
    ) -> pb.GetStatusResponse:
        status = await self._table.status()
        response = pb.GetStatusResponse(
            head_revision=status.head.revision, head_mark=status.head.mark
        )
        for verifier in status.verifiers:
            message = response.verifiers.add(
                id=verifier.id,
                host=verifier.host,
                process_id=verifier.process_id,
                version=verifier.version,
                acknowledged_revision=verifier.acknowledged_revision,
                lag=max(0, status.head.revision - verifier.acknowledged_revision),
                lease_duration=_duration(verifier.lease_seconds),
                lease_remaining=_duration(verifier.lease_remaining_seconds),
                clients=verifier.clients,
                notifications=pb.Notifications.ValueType(verifier.notifications),
                answering=verifier.id == self._own_id,
                waiting_for=verifier.waiting_for,
            )
            message.start_time.FromDatetime(verifier.start_time)
        return response


def _duration(seconds: float) -> duration_pb2.Duration:
    """Return a duration to the millisecond: people read it."""
    whole, rest = divmod(round(seconds * 1_000), 1_000)
    return duration_pb2.Duration(seconds=whole, nanos=rest * 1_000_000)
