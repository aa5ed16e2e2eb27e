"""The servicer of StatusService: reads the table of verifiers and converts it to protobuf.

Owns which warnings an answer contains. It does not own their texts or the table.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc
from google.protobuf import duration_pb2
from latchkey_proto.v1 import status_service_pb2 as pb
from latchkey_proto.v1 import status_service_pb2_grpc as pb_grpc

from latchkey_service.coherence.verifier_table import Status, VerifierTable
from latchkey_service.tokens import fleet

__all__ = ["StatusService"]

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[object, object]


class StatusService(pb_grpc.StatusServiceServicer):
    """Serves latchkey.v1.StatusService. The .proto documents the answer."""

    def __init__(
        self, table: VerifierTable, own_id: str, warnings: Callable[[], list[str]]
    ) -> None:
        self._table = table
        self._own_id = own_id
        # The current warnings of this process: while commits hang, it cannot write them to its row.
        self._warnings = warnings

    async def GetStatus(
        self, request: pb.GetStatusRequest, context: "Context"
    ) -> pb.GetStatusResponse:
        status = await self._table.status()
        response = pb.GetStatusResponse(
            head_revision=status.head.revision,
            head_mark=status.head.mark,
            warnings=self._warnings_of(status),
            schema_version=status.schema,
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
                pepper_ids=verifier.pepper_ids,
                database_host=verifier.database_host,
                system_identifier=verifier.server_identifier,
                timeline=verifier.server_timeline,
            )
            message.start_time.FromDatetime(verifier.start_time)
        return response

    def _warnings_of(self, status: Status) -> list[str]:
        """Return each warning once, those of the answering process first."""
        found = [*self._warnings()]
        found += [mismatch.warning() for mismatch in fleet.mismatches(status.verifiers)]
        for verifier in status.verifiers:
            if verifier.lease_remaining_seconds > 0 and verifier.id != self._own_id:
                found += verifier.warnings
        return list(dict.fromkeys(found))


def _duration(seconds: float) -> duration_pb2.Duration:
    """Return a duration rounded to milliseconds, because people read it."""
    whole, rest = divmod(round(seconds * 1_000), 1_000)
    return duration_pb2.Duration(seconds=whole, nanos=rest * 1_000_000)
