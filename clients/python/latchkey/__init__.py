"""Python client library of Latchkey: manage API tokens, verify secrets, guard your own service.

This package turns the gRPC contract (proto/latchkey/v1) into typed values, deadlines, safe retries
and exceptions. The guards for gRPC and ASGI servers are in `latchkey.guards`. They are not imported
here, so only their users need their dependencies.

"Coherence rule N" means rule N of docs/protocol.md.
"""

from latchkey._audit import AuditEntry, AuditFilter, AuditPage, Outcome
from latchkey._connection import current_person
from latchkey._imported import ImportedToken, ImportOutcome, ImportResult
from latchkey._rate_limit import RateLimit
from latchkey._version import __version__
from latchkey.access import Access
from latchkey.client import Client
from latchkey.errors import (
    AccessError,
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    InternalError,
    InvalidArgument,
    LatchkeyError,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    UnexpectedStatus,
)
from latchkey.filters import TokenFilter, TokenOrder, TokenState
from latchkey.models import (
    CallerUsage,
    Change,
    CreatedToken,
    Deletions,
    FoundPage,
    FoundToken,
    Limits,
    Notifications,
    Page,
    Receipt,
    Revocation,
    RotatedToken,
    Scope,
    SecretOutcome,
    Status,
    Token,
    TokenSecret,
    Unchanged,
    Verdict,
    Verification,
    VerifierStats,
    VerifierStatus,
)
from latchkey.secret import Secret
from latchkey.verifier import Verifier

__all__ = [
    "Access",
    "AccessError",
    "AlreadyExists",
    "AuditEntry",
    "AuditFilter",
    "AuditPage",
    "CallerUsage",
    "Change",
    "Client",
    "CreatedToken",
    "DeadlineExceeded",
    "Deletions",
    "FailedPrecondition",
    "FieldViolation",
    "FoundPage",
    "FoundToken",
    "ImportOutcome",
    "ImportResult",
    "ImportedToken",
    "InternalError",
    "InvalidArgument",
    "LatchkeyError",
    "Limits",
    "NotFound",
    "Notifications",
    "Outcome",
    "Page",
    "PermissionDenied",
    "RateLimit",
    "Receipt",
    "ResourceExhausted",
    "Revocation",
    "RotatedToken",
    "Scope",
    "Secret",
    "SecretOutcome",
    "Status",
    "Token",
    "TokenFilter",
    "TokenOrder",
    "TokenSecret",
    "TokenState",
    "Unauthenticated",
    "Unavailable",
    "Unchanged",
    "UnexpectedStatus",
    "Verdict",
    "Verification",
    "Verifier",
    "VerifierStats",
    "VerifierStatus",
    "__version__",
    "current_person",
]
