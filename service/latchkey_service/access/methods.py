"""The table of all methods: who may call them, and how large a request may be.

No other method is served.
"""

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

__all__ = [
    "BATCH_VERIFY",
    "IMPORTER",
    "MANAGER",
    "METHODS",
    "OPEN",
    "OPERATOR",
    "REFLECTION",
    "REMOVALS",
    "REVOKER",
    "ROLES",
    "ROTATE",
    "TWO_SIDED",
    "UPDATE",
    "VERIFIER",
    "VERIFY",
    "AccountSource",
    "Rule",
    "rule_of",
]


class AccountSource(enum.Enum):
    """Where a method names its account, for callers that are limited to certain accounts."""

    NONE = enum.auto()
    """The method does not concern accounts."""
    REQUEST = enum.auto()
    """In `account_id` of the request."""
    ANSWER = enum.auto()
    """In the token of each answer. Another account's token is UNKNOWN to the caller."""
    ALL = enum.auto()
    """The method concerns all accounts at once."""


# Size limits of encoded requests. The parsing time is proportional to the size. So is the memory of
# the parsed request, which is at least 10 times as large. Most requests have a few short fields.
REQUEST_BYTES_MAX: Final = 8 * 1024
# A secret (68 characters at most), an address, and 64 permissions of 250 bytes.
VERIFY_BYTES_MAX: Final = 16 * 1024
# 1,000 questions of 262 bytes: a secret, an address and some permissions each. The slowest request
# within the limit, 131,072 empty questions, takes 7 ms to parse.
BATCH_VERIFY_BYTES_MAX: Final = 256 * 1024
# The fields of a token: 16 labels of 318 characters, a name of 64 and a description of 256, each of
# up to 4 bytes, 32 networks and 64 permissions take 28 KiB. The slowest request within the limit,
# 4,000 labels, takes 0.3 ms to parse.
TOKEN_BYTES_MAX: Final = 32 * 1024
# 1,000 ids of 30 characters, labels, and texts take 64 KiB. The slowest request within the limit,
# 48,000 empty ids, takes 2 ms to parse.
FILTER_BYTES_MAX: Final = 96 * 1024
# 1,000 secrets of 128 characters, as long as imported ones may be, take 131 KB. The slowest request
# within the limit, 65,000 empty ones, takes some milliseconds to parse.
REVOKE_SECRET_BYTES_MAX: Final = 128 * 1024
# 1,000 tokens with 500 bytes of name, account, hash, hint, times and labels each. Larger rows go in
# smaller batches. 260,000 empty rows would take 40 to 100 ms to parse, so the rows are counted
# before.
IMPORT_BYTES_MAX: Final = 512 * 1024
# A report of 1,000 uses takes up to 90 KB: a token's id, a hint, a count and two ages each. 65,000
# empty uses would take 8 to 20 ms to parse, so the uses are counted before.
WATCH_BYTES_MAX: Final = 128 * 1024
# Twice the largest legal numbers of rows and of uses: the servicers check those, with the reason.
IMPORT_FIELDS_MAX: Final = 2_000
WATCH_FIELDS_MAX: Final = 2_000


class Rule(NamedTuple):
    """How to authorize, bound and audit a method. If `role` is None, everyone may call it."""

    role: str | None
    account: AccountSource = AccountSource.NONE
    audited: bool = False
    """Whether each call is written to the audit table."""
    bytes_max: int = REQUEST_BYTES_MAX
    """The size limit of a request, or of each message of a stream. It is checked after the caller
    is authorized, and before the request is parsed."""
    fields_max: int = 0
    """The limit of fields, checked like the size; 0 means none."""
    fields_in: frozenset[int] = frozenset()
    """The fields whose own fields count, too."""


VERIFIER: Final = "verifier"
MANAGER: Final = "manager"
OPERATOR: Final = "operator"
REVOKER: Final = "revoker"
IMPORTER: Final = "importer"
ROLES: Final = (VERIFIER, MANAGER, OPERATOR, REVOKER, IMPORTER)
OPEN: Final = Rule(None)

_TOKENS: Final = "/latchkey.v1.TokenService/"
VERIFY: Final = _TOKENS + "Verify"
BATCH_VERIFY: Final = _TOKENS + "BatchVerify"
METHODS: Final[Mapping[str, Rule]] = MappingProxyType(
    {
        VERIFY: Rule(VERIFIER, AccountSource.ANSWER, bytes_max=VERIFY_BYTES_MAX),
        BATCH_VERIFY: Rule(VERIFIER, AccountSource.ANSWER, bytes_max=BATCH_VERIFY_BYTES_MAX),
        _TOKENS + "Watch": Rule(
            VERIFIER,
            AccountSource.ALL,
            bytes_max=WATCH_BYTES_MAX,
            fields_max=WATCH_FIELDS_MAX,
            # use_report and rate_shares_request
            fields_in=frozenset((5, 6)),
        ),
        _TOKENS + "Create": Rule(
            MANAGER, AccountSource.REQUEST, audited=True, bytes_max=TOKEN_BYTES_MAX
        ),
        _TOKENS + "Get": Rule(MANAGER, AccountSource.REQUEST, audited=True),
        _TOKENS + "GetUsage": Rule(MANAGER, AccountSource.REQUEST, audited=True),
        # Reads only settings and policy.
        _TOKENS + "GetLimits": Rule(MANAGER, AccountSource.REQUEST),
        _TOKENS + "List": Rule(
            MANAGER, AccountSource.REQUEST, audited=True, bytes_max=FILTER_BYTES_MAX
        ),
        _TOKENS + "Delete": Rule(MANAGER, AccountSource.REQUEST, audited=True),
        _TOKENS + "Update": Rule(
            MANAGER, AccountSource.REQUEST, audited=True, bytes_max=TOKEN_BYTES_MAX
        ),
        _TOKENS + "Disable": Rule(MANAGER, AccountSource.REQUEST, audited=True),
        _TOKENS + "Enable": Rule(MANAGER, AccountSource.REQUEST, audited=True),
        _TOKENS + "Rotate": Rule(MANAGER, AccountSource.REQUEST, audited=True),
        _TOKENS + "RetireSecrets": Rule(MANAGER, AccountSource.REQUEST, audited=True),
        _TOKENS + "DeleteAll": Rule(
            MANAGER, AccountSource.REQUEST, audited=True, bytes_max=FILTER_BYTES_MAX
        ),
        # The secrets may belong to any account.
        _TOKENS + "RevokeSecret": Rule(
            REVOKER, AccountSource.ALL, audited=True, bytes_max=REVOKE_SECRET_BYTES_MAX
        ),
        _TOKENS + "ReportSecret": Rule(
            REVOKER, AccountSource.ALL, audited=True, bytes_max=REVOKE_SECRET_BYTES_MAX
        ),
        # The rows may belong to any account.
        _TOKENS + "Import": Rule(
            IMPORTER,
            AccountSource.ALL,
            audited=True,
            bytes_max=IMPORT_BYTES_MAX,
            fields_max=IMPORT_FIELDS_MAX,
        ),
        # The tokens may belong to any account.
        _TOKENS + "Find": Rule(OPERATOR, AccountSource.ALL, audited=True),
        "/latchkey.v1.StatusService/GetStatus": Rule(OPERATOR),
        "/latchkey.v1.MaintenanceService/InvalidateAll": Rule(
            OPERATOR, AccountSource.ALL, audited=True
        ),
        "/latchkey.v1.AuditService/List": Rule(OPERATOR, AccountSource.REQUEST, audited=True),
        "/grpc.health.v1.Health/Check": OPEN,
        "/grpc.health.v1.Health/Watch": OPEN,
        # Served only with LATCHKEY_REFLECTION.
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": OPEN,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": OPEN,
    }
)
REFLECTION: Final = "/grpc.reflection."
# The methods that only take rights away. They go before others, because their caller may be closing
# a hole. `Update` and `Rotate` can do either, which only their requests show.
REMOVALS: Final = frozenset(
    _TOKENS + name for name in ("Delete", "DeleteAll", "Disable", "RetireSecrets", "RevokeSecret")
)
UPDATE: Final = _TOKENS + "Update"
ROTATE: Final = _TOKENS + "Rotate"
TWO_SIDED: Final = frozenset((UPDATE, ROTATE))


def rule_of(path: str) -> Rule:
    """Return a method's rule. Raises LookupError if the table lacks the method."""
    try:
        return METHODS[path]
    except KeyError:
        raise LookupError(f"access/methods.py lacks a rule for {path}") from None
