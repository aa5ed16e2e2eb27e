"""Which methods the contract calls idempotent, for clients and proxies that retry."""

import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions
from latchkey_proto.v1 import (
    audit_service_pb2,
    maintenance_service_pb2,
    status_service_pb2,
    token_service_pb2,
)

MODULES = (audit_service_pb2, maintenance_service_pb2, status_service_pb2, token_service_pb2)
READS = {"Find", "Get", "GetLimits", "GetStatus", "GetUsage", "List"}
# A repeated Create or Rotate makes another secret, unless it has a request_id. A verify counts as a
# use and against the rate limit of its token. A Watch is a stream.
NO_LEVEL = {"BatchVerify", "Create", "Rotate", "Verify", "Watch"}
METHODS = [
    method
    for module in MODULES
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method.full_name))
def test_each_method_has_its_level(method: MethodDescriptor) -> None:
    """Reads have no side effects, and changes can be repeated, except those that are named here."""
    level = MethodOptions.IdempotencyLevel.Name(method.GetOptions().idempotency_level)
    if method.name in NO_LEVEL:
        assert level == "IDEMPOTENCY_UNKNOWN"
    else:
        assert level == ("NO_SIDE_EFFECTS" if method.name in READS else "IDEMPOTENT")
