"""The policy: which callers may call which methods for which accounts. Parses TOML. Pure.

    [callers.shop]
    certificates = ["spiffe://example.org/shop", "shop.internal"]
    credentials = ["sha256:…"]          # latchkey policy new-caller shop
    roles = ["verifier"]
    accounts = ["acme", "team-*"]       # default: every account
    rates = { verifier = 5000 }         # default: no limit
    watches = 200                       # default: half of a process's limit
    reports_people = true               # whether it names the person it acts for; default: no

    [callers.portal]
    certificates = ["portal.internal"]
    roles = ["manager"]
    max_ttl = "90d"                     # of the tokens that it creates; default: no limit

    [accounts."team-*"]
    max_ttl = "30d"                     # of the tokens of these accounts, whoever creates them
    require_expiry = true               # included in max_ttl

    [roles.auditor]                     # in addition to verifier, manager and operator
    methods = ["/latchkey.v1.AuditService/List"]

Callers that the policy does not list may call nothing. The policy contains no secrets, only digests
of credentials.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Annotated, Final, Self, TypeVar

from latchkey_coherence.identifiers import ACCOUNT_ID
from latchkey_coherence.redaction import redact
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from latchkey_service.access.credentials import DIGEST
from latchkey_service.access.methods import METHODS, ROLES
from latchkey_service.access.rates import RateLimits, limits_for
from latchkey_service.lifetime import NO_RULES, Lifetime, LifetimeRules, duration_in

__all__ = [
    "ANONYMOUS",
    "WATCHES_MAX",
    "Accounts",
    "Caller",
    "Policy",
    "PolicyError",
    "is_name",
    "parse",
]

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_URI: Final = re.compile(r"spiffe://[a-z0-9._-]{1,255}(/[A-Za-z0-9._-]+)*")
_DNS: Final = re.compile(
    r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*"
)
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
_ACCOUNT: Final = re.compile(ACCOUNT_ID.pattern + r"\*?")
# Default limit of a caller's streams in a process: half of `watch_sessions.WATCH_SESSIONS_MAX`.
WATCHES_MAX: Final = 5_000
# A higher rate would not limit anything, and a lower one would never allow a call.
_Rate = Annotated[int, Field(ge=1, le=1_000_000)]
# A log line has to hold the message.
_MISTAKES_MAX: Final = 10


class PolicyError(Exception):
    """The policy is invalid. The message names the place in the file and the reason.

    It quotes the file, except for text that could be a misplaced credential.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redact(message, "…"))


@dataclass(frozen=True, slots=True)
class Accounts:
    """The accounts that a caller may act for."""

    exact: frozenset[str]
    prefixes: tuple[str, ...]

    def allow(self, account_id: str) -> bool:
        """Return whether the caller may act for `account_id`, which may be invalid."""
        return account_id in self.exact or account_id.startswith(self.prefixes)


@dataclass(frozen=True, slots=True)
class Caller:
    """A caller in the policy. `accounts` None: all accounts; `rates` None: unlimited."""

    name: str
    methods: frozenset[str]
    accounts: Accounts | None = None
    rates: RateLimits | None = field(default=None, compare=False)
    watches_max: int = WATCHES_MAX
    reports_people: bool = False
    """Whether the audit log records the person that the caller says it acts for."""
    lifetimes: LifetimeRules = field(default=NO_RULES, compare=False)


# Without a policy, every call runs as this caller.
ANONYMOUS: Final = Caller("", frozenset(METHODS))


@dataclass(frozen=True, slots=True)
class Policy:
    """All callers, indexed by what they present."""

    certificates: Mapping[str, Caller]
    """By SPIFFE URI, or by DNS name in lower case."""
    credentials: Mapping[bytes, Caller] = field(repr=False)
    """By digest (32 bytes). The time that a look-up takes may reveal part of a digest, but a digest
    is not secret: nobody can compute a credential of 256 random bits from it."""

    unidentified: tuple[str, ...] = ()
    """Callers with neither certificate nor credential, so no call can come from them."""
    digest: str = ""
    """SHA-256 of the text, in hexadecimal."""

    @property
    def callers(self) -> frozenset[str]:
        """The names of all callers that have a certificate or credential."""
        identified = (*self.certificates.values(), *self.credentials.values())
        return frozenset(caller.name for caller in identified)


def parse(text: str) -> Policy:
    """Parse the text of a policy file. Raises PolicyError."""
    try:
        document = _Document.model_validate(tomllib.loads(text))
    except ValidationError as error:
        raise PolicyError(_describe(error)) from None
    except tomllib.TOMLDecodeError as error:
        raise PolicyError(f"is not TOML: {error}") from None
    except RecursionError:
        raise PolicyError("is not TOML: brackets are nested too deeply") from None
    except ValueError:
        # Python limits the digits of a number, and tomllib passes the error on.
        raise PolicyError("is not TOML: a number has too many digits") from None
    roles = {role: _methods_of(role) for role in ROLES}
    roles |= {name: frozenset(table.methods) for name, table in document.roles.items()}
    certificates: dict[str, Caller] = {}
    credentials: dict[bytes, Caller] = {}
    accounts = {name: table.lifetime for name, table in document.accounts.items()}
    unidentified = []
    for name, table in document.callers.items():
        where = _path(("callers", name))
        if unknown := [role for role in table.roles if role not in roles]:
            known = ", ".join(roles)
            raise PolicyError(f"{where}.roles: unknown role {unknown[0]!r}; known: {known}")
        caller = Caller(
            name,
            frozenset().union(*(roles[role] for role in table.roles)),
            None if table.accounts is None else _accounts(table.accounts),
            limits_for(table.rates, restricted=table.accounts is not None),
            table.watches,
            table.reports_people,
            LifetimeRules(table.lifetime, accounts),
        )
        if not table.certificates and not table.credentials:
            unidentified.append(name)
        for certificate in table.certificates:
            owner = certificates.setdefault(certificate, caller)
            if owner is not caller:
                raise PolicyError(
                    f"{where}.certificates: {certificate!r} already belongs to {owner.name}"
                )
        for digest in table.credentials:
            owner = credentials.setdefault(bytes.fromhex(digest), caller)
            if owner is not caller:
                raise PolicyError(f"{where}.credentials: a digest already belongs to {owner.name}")
    digest = sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return Policy(certificates, credentials, tuple(unidentified), digest)


def is_name(text: str) -> bool:
    """Return whether `text` is a valid name of a caller or role."""
    return _NAME.fullmatch(text) is not None


def _name(text: str) -> str:
    if not is_name(text):
        raise ValueError(f"{text!r} is not a name: use 1-64 characters of A-Za-z0-9._-")
    return text


def _unique(texts: list[str]) -> list[str]:
    if len(set(texts)) < len(texts):
        raise ValueError("contains a duplicate")
    return texts


def _certificate(text: str) -> str:
    key = text if "://" in text else text.lower()
    if not (_URI if "://" in key else _DNS).fullmatch(key):
        raise ValueError(f"{text!r} is neither spiffe://TRUST-DOMAIN/PATH nor a DNS name")
    return key


def _digest(text: str) -> str:
    match = DIGEST.fullmatch(text)
    if match is None:
        # Not quoted: it may be a credential.
        raise ValueError(
            "must be sha256: and 64 hexadecimal digits, as printed by 'latchkey policy "
            "new-caller'; never the credential itself"
        )
    return match[1]


def _account(text: str) -> str:
    if not _ACCOUNT.fullmatch(text):
        raise ValueError(
            f"{text!r} is neither an account nor a prefix such as 'team-*'; omit accounts to "
            "allow all"
        )
    return text


def _limited_account(text: str) -> str:
    if not _ACCOUNT.fullmatch(text):
        raise ValueError(f"{text!r} is neither an account nor a prefix such as 'team-*'")
    return text


def _duration(text: str) -> str:
    duration_in(text)
    return text


def _method(text: str) -> str:
    if text not in METHODS:
        raise ValueError(f"unknown method {text!r}")
    return text


def _built_in(role: str) -> str:
    if role not in ROLES:
        raise ValueError(f"unknown role; known: {', '.join(ROLES)}")
    return role


def _own_role(name: str) -> str:
    if name in ROLES:
        raise ValueError(f"{name} is built in and cannot be changed")
    return _name(name)


class _Table(BaseModel):
    # Strict, because in TOML, neither true nor "5" is a number.
    model_config = ConfigDict(extra="forbid", strict=True)


_Item = TypeVar("_Item", bound=str)
_Unique = Annotated[list[_Item], AfterValidator(_unique)]


class _Limited(_Table):
    max_ttl: Annotated[str, AfterValidator(_duration)] | None = None
    require_expiry: bool | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.max_ttl is not None and self.require_expiry is False:
            raise ValueError("max_ttl requires an expiry; remove require_expiry = false")
        return self

    @property
    def lifetime(self) -> Lifetime:
        ttl = None if self.max_ttl is None else duration_in(self.max_ttl)
        return Lifetime(ttl, bool(self.require_expiry))


class _Account(_Limited):
    pass


class _Caller(_Limited):
    accounts: _Unique[Annotated[str, AfterValidator(_account)]] | None = None
    certificates: _Unique[Annotated[str, AfterValidator(_certificate)]] = []
    credentials: _Unique[Annotated[str, AfterValidator(_digest)]] = []
    rates: dict[Annotated[str, AfterValidator(_built_in)], _Rate] | None = None
    reports_people: bool = False
    roles: _Unique[str] = []
    watches: Annotated[int, Field(ge=0, le=WATCHES_MAX * 2)] = WATCHES_MAX


class _Role(_Table):
    methods: _Unique[Annotated[str, AfterValidator(_method)]] = []


class _Document(_Table):
    accounts: dict[Annotated[str, AfterValidator(_limited_account)], _Account] = {}
    callers: dict[Annotated[str, AfterValidator(_name)], _Caller] = {}
    roles: dict[Annotated[str, AfterValidator(_own_role)], _Role] = {}


# The models of the tables, by the first part of their paths.
_TABLES: Final[Mapping[str, type[_Table]]] = {
    "": _Document,
    "accounts": _Account,
    "callers": _Caller,
    "roles": _Role,
}


def _accounts(accounts: list[str]) -> Accounts:
    return Accounts(
        frozenset(account for account in accounts if not account.endswith("*")),
        tuple(account[:-1] for account in accounts if account.endswith("*")),
    )


def _methods_of(role: str) -> frozenset[str]:
    return frozenset(path for path, rule in METHODS.items() if rule.role == role)


def _describe(error: ValidationError) -> str:
    """Return the first mistakes, one per line, each with its path in the file."""
    mistakes = error.errors(include_input=False, include_url=False)
    lines = []
    for mistake in mistakes[:_MISTAKES_MAX]:
        where, message = mistake["loc"], mistake["msg"].removeprefix("Value error, ")
        kind = mistake["type"]
        if where[-1] == "[key]" and kind != "extra_forbidden":
            # pydantic marks a mistake in a key with this element.
            where = where[:-1]
        match kind:
            case "extra_forbidden":
                known = _TABLES["" if len(where) == 1 else str(where[0])].model_fields
                message = f"unknown key; known: {', '.join(sorted(known))}"
            case "model_type" | "dict_type":
                message = "must be a table"
            case "list_type":
                message = 'must be a list, such as ["a", "b"]'
        lines.append(f"{_path(where)}: {message}")
    if more := len(mistakes) - len(lines):
        lines.append(f"and {more} more")
    return "\n".join(lines)


def _path(where: tuple[str | int, ...]) -> str:
    """Return the path of a value, with quotes where TOML needs them."""
    return ".".join(str(part) if _BARE_KEY.fullmatch(str(part)) else repr(part) for part in where)
