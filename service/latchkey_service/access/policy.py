"""The policy: which callers may call which methods for which accounts. Parses TOML. Pure.

    [callers.shop]
    certificates = ["spiffe://example.org/shop", "shop.internal"]
    credentials = ["sha256:…"]          # latchkey policy new-caller shop
    roles = ["verifier"]
    accounts = ["acme", "team-*"]       # default: every account
    rates = { verifier = 5000 }         # default: no limit
    watches = 200                       # default: half of a process's limit

    [roles.auditor]                     # in addition to verifier, manager and operator
    methods = ["/latchkey.v1.AuditService/List"]

Callers that the policy does not list may call nothing. The policy contains no secrets, only digests
of credentials.
"""

import contextvars
import re
import tomllib
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from hmac import compare_digest as _same
from types import MappingProxyType
from typing import Any, Final

from latchkey_service.access.credentials import DIGEST
from latchkey_service.access.methods import METHODS, ROLES
from latchkey_service.access.rates import RateLimits
from latchkey_service.secret_format import redact_secrets

__all__ = [
    "ANONYMOUS",
    "WATCHES_MAX",
    "Accounts",
    "Caller",
    "Policy",
    "PolicyError",
    "current_caller",
    "is_name",
    "parse",
]

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_URI: Final = re.compile(r"spiffe://[a-z0-9._-]{1,255}(/[A-Za-z0-9._-]+)*")
_DNS: Final = re.compile(
    r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*"
)
_ACCOUNT: Final = re.compile(r"[A-Za-z0-9._:-]{1,64}\*?")
_CALLER_KEYS: Final = ("accounts", "certificates", "credentials", "rates", "roles", "watches")
_ROLE_KEYS: Final = ("methods",)
# Default limit of a caller's streams in a process: half of `watch_sessions.WATCH_SESSIONS_MAX`.
WATCHES_MAX: Final = 5_000
# A higher rate would not limit anything, and a lower one would never allow a call.
_RATES: Final = range(1, 1_000_001)
# Prefix of a digest that selects the candidates; the whole digest is compared in constant time.
_SELECTOR_BYTES: Final = 8


class PolicyError(Exception):
    """The policy is invalid. The message gives the reason, and the line if there is one.

    It quotes the file, except for text that could be a misplaced credential.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redact_secrets(message))


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


# Without a policy, every call runs as this caller.
ANONYMOUS: Final = Caller("", frozenset(METHODS))

# Of the current verify. Set by the pipeline, so that the servicer can count the use.
current_caller: contextvars.ContextVar[Caller] = contextvars.ContextVar(
    "current_caller", default=ANONYMOUS
)


@dataclass(frozen=True, slots=True)
class Policy:
    """All callers, indexed by what they present."""

    certificates: Mapping[str, Caller]
    """By SPIFFE URI, or by DNS name in lower case."""
    _credentials: Mapping[bytes, tuple[tuple[bytes, Caller], ...]] = field(repr=False)

    def by_credential(self, digest: bytes) -> Caller | None:
        """Return the caller that owns the credential with this digest (32 bytes), or None."""
        found = None
        for known, caller in self._credentials.get(digest[:_SELECTOR_BYTES], ()):
            if _same(known, digest):
                found = caller
        return found

    @property
    def callers(self) -> frozenset[str]:
        """The names of all callers that have a certificate or credential."""
        by_digest = (caller for entry in self._credentials.values() for _, caller in entry)
        return frozenset(c.name for c in (*self.certificates.values(), *by_digest))


def parse(text: str) -> Policy:
    """Parse the text of a policy file. Raises PolicyError."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PolicyError(_tidy(str(error), text)) from None
    except (RecursionError, ValueError) as error:
        # Limits of Python, which tomllib passes on: nested brackets, and digits of a number.
        wrong = "brackets are nested too deeply"
        if isinstance(error, ValueError):
            wrong = "a number has too many digits"
        raise PolicyError(f"line {_line_of(type(error), text)}: {wrong}") from None
    return _Reader(text, document).read()


def is_name(text: str) -> bool:
    """Return whether `text` is a valid name of a caller or role."""
    return _NAME.fullmatch(text) is not None


class _Reader:
    """Builds the policy from a document, and finds the line of each mistake."""

    def __init__(self, text: str, document: dict[str, Any]) -> None:
        self._text = text
        self._document = document
        self._certificates: dict[str, Caller] = {}
        self._credentials: dict[bytes, list[tuple[bytes, Caller]]] = {}

    def read(self) -> Policy:
        self._keys((), self._document, ("callers", "roles"))
        roles = {role: _methods_of(role) for role in ROLES}
        for name, table in self._tables("roles"):
            if name in roles:
                raise self._error(("roles", name), f"{name} is built in and cannot be changed")
            self._keys(("roles", name), table, _ROLE_KEYS)
            roles[name] = frozenset(self._methods(name, table))
        for name, table in self._tables("callers"):
            self._keys(("callers", name), table, _CALLER_KEYS)
            self._caller(name, table, roles)
        credentials = {key: tuple(entries) for key, entries in self._credentials.items()}
        return Policy(MappingProxyType(self._certificates), MappingProxyType(credentials))

    def _methods(self, role: str, table: dict[str, Any]) -> list[str]:
        where = ("roles", role, "methods")
        methods = self._texts(where, table)
        for method in methods:
            if method not in METHODS:
                raise self._error(where, f"unknown method {method!r}")
        return methods

    def _caller(
        self, name: str, table: dict[str, Any], roles: Mapping[str, frozenset[str]]
    ) -> None:
        where = ("callers", name)
        methods: set[str] = set()
        for role in self._texts((*where, "roles"), table):
            if role not in roles:
                known = ", ".join(roles)
                raise self._error((*where, "roles"), f"unknown role {role!r}; known: {known}")
            methods |= roles[role]
        accounts = None
        if "accounts" in table:
            accounts = self._accounts((*where, "accounts"), table)
        rates = None
        if "rates" in table:
            rates = RateLimits(self._rates((*where, "rates"), table))
        watches = table.get("watches", WATCHES_MAX)
        if not _is_number(watches, range(WATCHES_MAX * 2 + 1)):
            raise self._error((*where, "watches"), f"must be a number from 0 to {WATCHES_MAX * 2}")
        caller = Caller(name, frozenset(methods), accounts, rates, watches)
        for certificate in self._texts((*where, "certificates"), table):
            key = certificate if "://" in certificate else certificate.lower()
            if not (_URI if "://" in key else _DNS).fullmatch(key):
                raise self._error(
                    (*where, "certificates"),
                    f"{certificate!r} is neither spiffe://TRUST-DOMAIN/PATH nor a DNS name",
                )
            if key in self._certificates:
                other = self._certificates[key].name
                raise self._error(
                    (*where, "certificates"), f"{certificate!r} already belongs to {other}"
                )
            self._certificates[key] = caller
        for credential in self._texts((*where, "credentials"), table):
            match = DIGEST.fullmatch(credential)
            if match is None:
                # Not quoted: it may be a credential.
                raise self._error(
                    (*where, "credentials"),
                    "must be sha256: and 64 hexadecimal digits, as printed by 'latchkey policy "
                    "new-caller'; never the credential itself",
                )
            digest = bytes.fromhex(match[1])
            entries = self._credentials.setdefault(digest[:_SELECTOR_BYTES], [])
            for there, owner in entries:
                if there == digest:
                    raise self._error(
                        (*where, "credentials"), f"a digest already belongs to {owner.name}"
                    )
            entries.append((digest, caller))

    def _accounts(self, where: tuple[str, ...], table: dict[str, Any]) -> Accounts:
        accounts = self._texts(where, table)
        for account in accounts:
            if not _ACCOUNT.fullmatch(account):
                raise self._error(
                    where,
                    f"{account!r} is neither an account nor a prefix such as 'team-*'; omit "
                    "accounts to allow all",
                )
        return Accounts(
            frozenset(account for account in accounts if not account.endswith("*")),
            tuple(account[:-1] for account in accounts if account.endswith("*")),
        )

    def _rates(self, where: tuple[str, ...], table: dict[str, Any]) -> dict[str, float]:
        rates = table[where[-1]]
        if not isinstance(rates, dict):
            raise self._error(where, "must be a table, such as { verifier = 5000, manager = 20 }")
        self._keys(where, rates, ROLES)
        for role, rate in rates.items():
            if not _is_number(rate, _RATES):
                raise self._error(
                    (*where, role),
                    f"must be calls per second, a whole number from {_RATES[0]} to {_RATES[-1]:,}",
                )
        return rates

    def _tables(self, key: str) -> list[tuple[str, dict[str, Any]]]:
        tables = self._document.get(key, {})
        if not isinstance(tables, dict):
            raise self._error((key,), f"must contain tables such as [{key}.NAME]")
        for name, table in tables.items():
            if not _NAME.fullmatch(name):
                raise self._error(
                    (key, name), f"{name!r} is not a name: use 1-64 characters of A-Za-z0-9._-"
                )
            if not isinstance(table, dict):
                raise self._error((key, name), f"must be a table, [{key}.{name}]")
        return list(tables.items())

    def _keys(self, where: tuple[str, ...], table: dict[str, Any], known: tuple[str, ...]) -> None:
        for key in table:
            if key not in known:
                raise self._error((*where, key), f"unknown key {key!r}; known: {', '.join(known)}")

    def _texts(self, where: tuple[str, ...], table: dict[str, Any]) -> list[str]:
        values = table.get(where[-1], [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self._error(where, 'must be a list of strings, such as ["a", "b"]')
        if len(set(values)) < len(values):
            raise self._error(where, "contains a duplicate")
        return values

    def _error(self, where: tuple[str, ...], reason: str) -> PolicyError:
        """Return an error with the line and path of the mistake."""
        return PolicyError(f"line {self._line(where)}: {'.'.join(where)}: {reason}")

    def _line(self, where: tuple[str, ...]) -> int:
        """Return the line number (from 1) of a key.

        tomllib does not record lines. So this bisects the lines that contain the key's name: the
        right one is the first line up to which the parsed text contains the key.
        """
        named = re.compile(re.escape(where[-1]) + r"""["']?\s*[=\].]""")
        lines = _lines(self._text)
        candidates = [number for number, line in enumerate(lines) if named.search(line)]
        after = bisect_left(
            candidates,
            True,  # noqa: FBT003 - the value that is searched for
            key=lambda number: _has("\n".join(lines[:number]), where),
        )
        return candidates[after - 1] + 1 if after else 1


def _is_number(value: object, numbers: range) -> bool:
    # In Python, bool is a subclass of int.
    return isinstance(value, int) and not isinstance(value, bool) and value in numbers


def _lines(text: str) -> list[str]:
    """Split as tomllib counts lines; splitlines() would also split at U+2028."""
    return text.removesuffix("\n").split("\n")


def _line_of(error: type[Exception], text: str) -> int:
    """Return the line number (from 1) from which on tomllib raises exactly this error."""
    lines = _lines(text)

    def raises(count: int) -> bool:
        try:
            tomllib.loads("\n".join(lines[:count]))
        except Exception as raised:  # noqa: BLE001 - the text may be cut at any point
            return type(raised) is error
        return False

    return bisect_left(range(1, len(lines)), True, key=raises) + 1  # noqa: FBT003 - searched for


def _has(text: str, where: tuple[str, ...]) -> bool:
    try:
        value: Any = tomllib.loads(text)
    except Exception:  # noqa: BLE001 - the text may be cut at any point
        # The cut is inside a value, so the key does not exist yet.
        return False
    for key in where:
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key]
    return True


def _methods_of(role: str) -> frozenset[str]:
    return frozenset(path for path, rule in METHODS.items() if rule.role == role)


def _tidy(message: str, text: str) -> str:
    """Put the line number first in tomllib's message, as in our own messages."""
    match = re.fullmatch(
        r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", message, re.DOTALL
    )
    if match is None:
        return message
    line = match[2] or len(_lines(text))
    return f"line {line}: {match[1][:1].lower()}{match[1][1:]}"
