"""A request for each method that succeeds for every caller that may make it."""

import os
from collections.abc import Callable
from itertools import count
from typing import Any

from google.protobuf import field_mask_pb2
from latchkey_proto.v1 import audit_service_pb2 as audit_pb
from latchkey_proto.v1 import maintenance_service_pb2 as maintenance_pb
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.contract.listeners import TOKENS, Listener

__all__ = ["AUDIT", "INVALIDATE_ALL", "STATUS", "allowed_request"]

STATUS = "/latchkey.v1.StatusService/GetStatus"
AUDIT = "/latchkey.v1.AuditService/List"
INVALIDATE_ALL = "/latchkey.v1.MaintenanceService/InvalidateAll"

_names = count(1)


def allowed_request(listener: Listener, path: str, account: str) -> Any:
    """Return a request of the unary method `path`, about the tokens of `account` on `listener`."""
    requests: dict[str, Callable[[], Any]] = {
        TOKENS + "Verify": lambda: pb.VerifyRequest(secret=listener.secrets[account]),
        TOKENS + "BatchVerify": lambda: pb.BatchVerifyRequest(
            requests=[pb.VerifyRequest(secret=listener.secrets[account])]
        ),
        TOKENS + "Create": lambda: pb.CreateRequest(
            account_id=account, name=f"n{next(_names)}", scope=pb.SCOPE_READ
        ),
        TOKENS + "Get": lambda: pb.GetRequest(account_id=account, id=listener.ids[account]),
        TOKENS + "GetUsage": lambda: pb.GetUsageRequest(
            account_id=account, id=listener.ids[account]
        ),
        TOKENS + "GetLimits": lambda: pb.GetLimitsRequest(account_id=account),
        TOKENS + "List": lambda: pb.ListRequest(account_id=account),
        TOKENS + "Delete": lambda: pb.DeleteRequest(
            account_id=account, id=listener.ids[f"{account} doomed"], no_wait=True
        ),
        TOKENS + "Update": lambda: pb.UpdateRequest(
            account_id=account,
            id=listener.ids[account],
            token=pb.Token(description="x"),
            update_mask=field_mask_pb2.FieldMask(paths=["description"]),
        ),
        TOKENS + "Disable": lambda: pb.DisableRequest(
            account_id=account, id=listener.ids[f"{account} spare"], no_wait=True
        ),
        TOKENS + "Enable": lambda: pb.EnableRequest(account_id=account, id=listener.ids[account]),
        TOKENS + "Rotate": lambda: pb.RotateRequest(
            account_id=account, id=listener.ids[f"{account} spare"], no_wait=True
        ),
        TOKENS + "RetireSecrets": lambda: pb.RetireSecretsRequest(
            account_id=account, id=listener.ids[f"{account} spare"], no_wait=True
        ),
        TOKENS + "DeleteAll": lambda: pb.DeleteAllRequest(account_id=account, dry_run=True),
        TOKENS + "RevokeSecret": lambda: pb.RevokeSecretRequest(secrets=["nonsense"]),
        TOKENS + "ReportSecret": lambda: pb.ReportSecretRequest(secrets=["nonsense"]),
        TOKENS + "Import": lambda: pb.ImportRequest(
            tokens=[
                pb.ImportedToken(
                    account_id=account,
                    name=f"n{next(_names)}",
                    scope=pb.SCOPE_READ,
                    secret_sha256=os.urandom(32),
                )
            ]
        ),
        TOKENS + "Find": lambda: pb.FindRequest(id=listener.ids[account]),
        STATUS: status_pb.GetStatusRequest,
        INVALIDATE_ALL: maintenance_pb.InvalidateAllRequest,
        AUDIT: lambda: audit_pb.AuditServiceListRequest(account_id=account),
    }
    return requests[path]()
