"""The one table of methods and who may call them. A method that is not in it is not served."""

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
    "ROLES",
    "VERIFIER",
    "Account",
    "Rule",
    "rule_of",
]


class Account(enum.Enum):
    """Where a method names the account that it is about, for callers limited to some."""

    NONE = enum.auto()
    """It is about no account: limits do not matter."""
    REQUEST = enum.auto()
    """In the request's `account_id`."""
    ANSWER = enum.auto()
    """In the token of each answer: that of another account is UNKNOWN to the caller."""
    ALL = enum.auto()
    """It is about all of them at once."""


class Rule(NamedTuple):
    """What is to be known of a method before it may run. `role` None: whoever asks."""

    role: str | None
    account: Account = Account.NONE
    audited: bool = False
    """Each call is written to the audit table."""


VERIFIER: Final = "verifier"
MANAGER: Final = "manager"
OPERATOR: Final = "operator"
ROLES: Final = (VERIFIER, MANAGER, OPERATOR)
OPEN: Final = Rule(None)

_TOKENS: Final = "/latchkey.v1.TokenService/"
METHODS: Final[Mapping[str, Rule]] = MappingProxyType(
    {
        _TOKENS + "Verify": Rule(VERIFIER, Account.ANSWER),
        _TOKENS + "BatchVerify": Rule(VERIFIER, Account.ANSWER),
        _TOKENS + "Watch": Rule(VERIFIER, Account.ALL),
        _TOKENS + "Create": Rule(MANAGER, Account.REQUEST, audited=True),
        _TOKENS + "Get": Rule(MANAGER, Account.REQUEST, audited=True),
        _TOKENS + "List": Rule(MANAGER, Account.REQUEST, audited=True),
        _TOKENS + "Delete": Rule(MANAGER, Account.REQUEST, audited=True),
        "/latchkey.v1.StatusService/GetStatus": Rule(OPERATOR),
        "/latchkey.v1.MaintenanceService/InvalidateAll": Rule(OPERATOR, Account.ALL, audited=True),
        "/latchkey.v1.AuditService/List": Rule(OPERATOR, Account.REQUEST),
        "/grpc.health.v1.Health/Check": OPEN,
        "/grpc.health.v1.Health/Watch": OPEN,
        # Only there where LATCHKEY_REFLECTION says so.
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": OPEN,
    }
)
REFLECTION: Final = "/grpc.reflection."


def rule_of(path: str) -> Rule:
    """Return a method's rule. Raises LookupError: whoever adds a method says who may call it."""
    try:
        return METHODS[path]
    except KeyError:
        raise LookupError(f"nobody has said in access/methods.py who may call {path}") from None
