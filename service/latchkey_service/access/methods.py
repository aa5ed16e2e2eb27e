"""The table of all methods and the roles that may call them. No other method is served."""

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

__all__ = [
    "MANAGER",
    "METHODS",
    "OPEN",
    "OPERATOR",
    "REFLECTION",
    "REVOKER",
    "ROLES",
    "VERIFIER",
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


class Rule(NamedTuple):
    """How to authorize and audit a method. If `role` is None, everyone may call it."""

    role: str | None
    account: AccountSource = AccountSource.NONE
    audited: bool = False
    """Whether each call is written to the audit table."""


VERIFIER: Final = "verifier"
MANAGER: Final = "manager"
OPERATOR: Final = "operator"
REVOKER: Final = "revoker"
ROLES: Final = (VERIFIER, MANAGER, OPERATOR, REVOKER)
OPEN: Final = Rule(None)

_TOKENS: Final = "/latchkey.v1.TokenService/"
METHODS: Final[Mapping[str, Rule]] = MappingProxyType(
    {
        _TOKENS + "Verify": Rule(VERIFIER, AccountSource.ANSWER),
        _TOKENS + "BatchVerify": Rule(VERIFIER, AccountSource.ANSWER),
        _TOKENS + "Watch": Rule(VERIFIER, AccountSource.ALL),
        _TOKENS + "Create": Rule(MANAGER, AccountSource.REQUEST, audited=True),
        _TOKENS + "Get": Rule(MANAGER, AccountSource.REQUEST, audited=True),
        _TOKENS + "List": Rule(MANAGER, AccountSource.REQUEST, audited=True),
        _TOKENS + "Delete": Rule(MANAGER, AccountSource.REQUEST, audited=True),
        _TOKENS + "Update": Rule(MANAGER, AccountSource.REQUEST, audited=True),
        _TOKENS + "Disable": Rule(MANAGER, AccountSource.REQUEST, audited=True),
        _TOKENS + "Enable": Rule(MANAGER, AccountSource.REQUEST, audited=True),
        _TOKENS + "Rotate": Rule(MANAGER, AccountSource.REQUEST, audited=True),
        _TOKENS + "RetireSecrets": Rule(MANAGER, AccountSource.REQUEST, audited=True),
        _TOKENS + "DeleteAll": Rule(MANAGER, AccountSource.REQUEST, audited=True),
        # The secrets may belong to any account.
        _TOKENS + "RevokeSecret": Rule(REVOKER, AccountSource.ALL, audited=True),
        "/latchkey.v1.StatusService/GetStatus": Rule(OPERATOR),
        "/latchkey.v1.MaintenanceService/InvalidateAll": Rule(
            OPERATOR, AccountSource.ALL, audited=True
        ),
        "/latchkey.v1.AuditService/List": Rule(OPERATOR, AccountSource.REQUEST),
        "/grpc.health.v1.Health/Check": OPEN,
        "/grpc.health.v1.Health/Watch": OPEN,
        # Served only with LATCHKEY_REFLECTION.
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": OPEN,
    }
)
REFLECTION: Final = "/grpc.reflection."


def rule_of(path: str) -> Rule:
    """Return a method's rule. Raises LookupError if the table lacks the method."""
    try:
        return METHODS[path]
    except KeyError:
        raise LookupError(f"access/methods.py lacks a rule for {path}") from None
