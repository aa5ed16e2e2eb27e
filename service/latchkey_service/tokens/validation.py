"""Validates what owners enter: names, labels, expiry, networks, permissions. Pure.

Checks counts and lengths before contents, so that a large request costs little.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Network, ip_network
from uuid import UUID

from latchkey_coherence.identifiers import ACCOUNT_ID
from latchkey_coherence.names import IGNORABLE
from latchkey_coherence.rate import RateLimit
from latchkey_coherence.verdict import PERMISSION

from latchkey_service.errors import FieldViolation, InvalidArgument, ViolationReason
from latchkey_service.lifetime import Lifetime, in_words
from latchkey_service.secret_format import CREDENTIAL_LENGTH, contains_secret
from latchkey_service.tokens.names import is_visible
from latchkey_service.tokens.verdict import Scope

__all__ = [
    "LABELS_MAX",
    "NAME_LENGTH_MAX",
    "account_violations",
    "canonical_network",
    "check",
    "description_violations",
    "expire_time_violations",
    "grace_violations",
    "id_violations",
    "label_violations",
    "lifetime_violations",
    "name_violations",
    "networks_in",
    "new_token_violations",
    "permissions_in",
    "printable",
    "rate_limit_in",
    "request_id_in",
    "secret_violations",
    "ttl_violations",
]

DESCRIPTION_LENGTH_MAX = 256
NETWORKS_MAX = 32
PERMISSIONS_MAX = 64
RATE_MAX = 1_000_000
RATE_PERIODS = (timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1))
NAME_LENGTH_MAX = 64
LABELS_MAX = 16
LABEL_KEY_LENGTH_MAX = 63
LABEL_VALUE_LENGTH_MAX = 255
ID_LENGTH_MAX = 64
# The last whole second that a Timestamp can hold. asyncpg converts the last microsecond of datetime
# to infinity.
END_OF_TIME = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
# Clients compute a time from a duration by their own clocks, which may be ahead of this one.
CLOCK_TOLERANCE = timedelta(minutes=1)
# Longer texts are rejected for their length.
SCANNED_LENGTH_MAX = 1_000
# A label key that an error message may repeat.
_PLAIN_KEY = re.compile(r"[A-Za-z0-9._/-]{1,32}")


def expire_time_violations(expire_time: datetime | None, now: datetime) -> list[FieldViolation]:
    """Check an expiry. None means never."""
    if expire_time is None or now < expire_time <= END_OF_TIME:
        return []
    return [FieldViolation("expire_time", "must be in the future and before the year 10000")]


def lifetime_violations(
    field: str, expire_time: datetime | None, lifetime: Lifetime, now: datetime
) -> list[FieldViolation]:
    """Check an expiry, which is valid otherwise, against a limit. None means never."""
    ttl_max = lifetime.max_ttl
    longest = "" if ttl_max is None else f": at most {in_words(ttl_max)} from now"
    if expire_time is None:
        if not lifetime.requires_expiry:
            return []
        problem = f"is required, because this service limits how long tokens live{longest}"
        return [_beyond(field, problem, "EXPIRY_REQUIRED", ttl_max)]
    if ttl_max is None or expire_time - now <= ttl_max + CLOCK_TOLERANCE:
        return []
    problem = f"is too late for this service{longest}"
    return [_beyond(field, problem, "EXPIRY_TOO_LATE", ttl_max)]


def grace_violations(grace: timedelta, lifetime: Lifetime) -> list[FieldViolation]:
    """Check the grace of a Rotate against a limit."""
    if lifetime.max_ttl is None or grace <= lifetime.max_ttl:
        return []
    problem = f"is too long for this service: at most {in_words(lifetime.max_ttl)}"
    return [_beyond("grace", problem, "EXPIRY_TOO_LATE", lifetime.max_ttl)]


def _beyond(
    field: str, problem: str, reason: ViolationReason, ttl_max: timedelta | None
) -> FieldViolation:
    if ttl_max is None:
        return FieldViolation(field, problem, reason)
    seconds = str(int(ttl_max.total_seconds()))
    return FieldViolation(field, problem, reason, (("max_ttl_seconds", seconds),))


def ttl_violations(ttl: timedelta, now: datetime) -> list[FieldViolation]:
    """Check a time to live. A valid one can be added to `now`."""
    if ttl <= timedelta(0):
        return [FieldViolation("ttl", "must be greater than zero")]
    if ttl > END_OF_TIME - now:
        return [FieldViolation("ttl", "must end before the year 10000")]
    return []


def check(*violations: FieldViolation) -> None:
    """Raise InvalidArgument if there are violations."""
    if violations:
        raise InvalidArgument(*violations)


def account_violations(account_id: str) -> list[FieldViolation]:
    """Check an account id."""
    if not account_id:
        return [FieldViolation("account_id", "is required")]
    if not ACCOUNT_ID.fullmatch(account_id):
        return [FieldViolation("account_id", "must be 1-128 characters of A-Za-z0-9._:@|+=/~-")]
    return []


def id_violations(token_id: str) -> list[FieldViolation]:
    """Check a token id."""
    if not token_id:
        return [FieldViolation("id", "is required")]
    if len(token_id) > ID_LENGTH_MAX or _has_control_characters(token_id):
        return [FieldViolation("id", "is not a valid token id")]
    return []


def name_violations(name: str) -> list[FieldViolation]:
    """Check a name, without surrounding white space."""
    if not name:
        return [FieldViolation("name", "is required")]
    if len(name) > NAME_LENGTH_MAX:
        return [FieldViolation("name", f"must have at most {NAME_LENGTH_MAX} characters")]
    if _has_control_characters(name):
        return [FieldViolation("name", "must not contain control characters")]
    if not is_visible(name):
        return [FieldViolation("name", "must contain a visible character")]
    return []


def label_violations(labels: Mapping[str, str]) -> list[FieldViolation]:
    """Check labels."""
    violations = []
    if len(labels) > LABELS_MAX:
        violations.append(FieldViolation("labels", f"must have at most {LABELS_MAX} pairs"))
        return violations
    for key, value in labels.items():
        # The error goes into headers, so it repeats the key only if that is short and plain. Other
        # keys could contain anything, even a secret.
        field = f'labels["{key}"]' if _PLAIN_KEY.fullmatch(key) else "labels"
        # Lengths first: searching 4 MiB for control characters would block the event loop.
        if not 1 <= len(key) <= LABEL_KEY_LENGTH_MAX:
            problem = f"its key must have 1-{LABEL_KEY_LENGTH_MAX} characters"
        elif len(value) > LABEL_VALUE_LENGTH_MAX:
            problem = f"must have at most {LABEL_VALUE_LENGTH_MAX} characters"
        elif _has_control_characters(key) or _has_control_characters(value):
            problem = "must not contain control characters"
        else:
            continue
        violations.append(FieldViolation(field, problem))
    return violations


def printable(text: str) -> bool:
    """Return whether `text` has no control characters."""
    return not _has_control_characters(text)


def _has_control_characters(text: str) -> bool:
    """Return whether `text` contains control characters, lone surrogates or line separators."""
    return any(unicodedata.category(character) in _CONTROL for character in text)


_CONTROL = frozenset({"Cc", "Cs", "Zl", "Zp"})


def description_violations(description: str) -> list[FieldViolation]:
    """Check a description. It may have several lines."""
    if len(description) > DESCRIPTION_LENGTH_MAX:
        return [
            FieldViolation("description", f"must have at most {DESCRIPTION_LENGTH_MAX} characters")
        ]
    if _has_control_characters(description.replace("\n", "")):
        return [FieldViolation("description", "must not contain control characters")]
    return []


def secret_violations(texts: Iterable[tuple[str, str]]) -> list[FieldViolation]:
    """Check (field, text) pairs for secrets, which would be stored and shown as they are.

    A secret is found even if it is broken into lines, or has invisible or full-width characters.
    """
    fields = {field: None for field, text in texts if _shows_secret(text[:SCANNED_LENGTH_MAX])}
    return [FieldViolation(field, "must not contain a secret") for field in fields]


def _shows_secret(text: str) -> bool:
    if len(text) < CREDENTIAL_LENGTH:
        # Both kinds of secrets are at least as long.
        return False
    # Without its spaces, a secret in one letter case would run into the word that follows it.
    visible = unicodedata.normalize("NFKC", IGNORABLE.sub("", text))
    return any(map(contains_secret, {text, visible, "".join(visible.split())}))


def new_token_violations(
    account_id: str, name: str, scope: int, labels: Mapping[str, str], description: str
) -> list[FieldViolation]:
    """Check the fields of a new token that are plain texts, and its scope."""
    texts = [("account_id", account_id), ("name", name)]
    if len(labels) <= LABELS_MAX:
        texts += [("labels", text) for pair in labels.items() for text in pair]
    violations = [
        *account_violations(account_id),
        *name_violations(name),
        *label_violations(labels),
        *description_violations(description),
        # The service stores and shows all of these as they are.
        *secret_violations([*texts, ("description", description)]),
    ]
    if scope not in (Scope.READ, Scope.WRITE):
        violations.append(FieldViolation("scope", "must be SCOPE_READ or SCOPE_WRITE"))
    return violations


def networks_in(texts: Sequence[str], violations: list[FieldViolation]) -> tuple[str, ...]:
    """Return the networks in canonical form, without repetitions. Adds to `violations`."""
    if len(texts) > NETWORKS_MAX:
        violations.append(
            FieldViolation("allowed_networks", f"must have at most {NETWORKS_MAX} networks")
        )
        return ()
    networks: dict[str, None] = {}
    for number, text in enumerate(texts):
        network = canonical_network(text)
        if network is None:
            violations.append(
                FieldViolation(
                    f"allowed_networks[{number}]",
                    "must be a network such as 192.0.2.0/24 or 2001:db8::/32, "
                    "without bits after the prefix",
                )
            )
        else:
            networks[network] = None
    return tuple(networks)


def canonical_network(text: str) -> str | None:
    """Return a network in canonical CIDR notation, or None if `text` is not one.

    A network of IPv4-mapped IPv6 addresses becomes an IPv4 network, as such an address counts as
    IPv4.
    """
    if not _NETWORK.fullmatch(text):
        return None
    try:
        network = ip_network(text)
    except ValueError:
        return None
    if isinstance(network, IPv4Network) or network.prefixlen < _MAPPED_PREFIX:
        return str(network)
    mapped = network.network_address.ipv4_mapped
    if mapped is None:
        return str(network)
    return str(IPv4Network((mapped, network.prefixlen - _MAPPED_PREFIX)))


def permissions_in(texts: Sequence[str], violations: list[FieldViolation]) -> tuple[str, ...]:
    """Return the permissions without repetitions. Adds to `violations`."""
    if len(texts) > PERMISSIONS_MAX:
        violations.append(
            FieldViolation("permissions", f"must have at most {PERMISSIONS_MAX} permissions")
        )
        return ()
    violations += [
        FieldViolation(
            f"permissions[{number}]",
            "must be resource:action, each part 1-31 of a-z0-9_.-, or the action *",
        )
        for number, text in enumerate(texts)
        if not PERMISSION.fullmatch(text)
    ]
    return tuple(dict.fromkeys(texts))


def rate_limit_in(
    asked: tuple[int, timedelta, int] | None, violations: list[FieldViolation]
) -> RateLimit | None:
    """Return the limit for a count, a period and a burst. Adds to `violations`.

    A burst of 0 stands for the count.
    """
    if asked is None:
        return None
    count, period, burst = asked
    found = []
    if not 1 <= count <= RATE_MAX:
        found.append(FieldViolation("rate_limit.count", f"must be 1 to {RATE_MAX:,}"))
    if period not in RATE_PERIODS:
        found.append(
            FieldViolation("rate_limit.period", "must be one second, one minute or one hour")
        )
    if not 0 <= burst <= RATE_MAX:
        found.append(FieldViolation("rate_limit.burst", f"must be 0 to {RATE_MAX:,}"))
    violations += found
    return None if found else RateLimit(count, round(period.total_seconds()), burst or count)


def request_id_in(text: str, violations: list[FieldViolation]) -> UUID | None:
    """Return the id of a request, or None if it has none. Adds to `violations`."""
    if not text:
        return None
    if not _UUID.fullmatch(text) or not (request_id := UUID(text)).int:
        violations.append(
            FieldViolation("request_id", "must be a UUID that is not nil, in 36 characters")
        )
        return None
    return request_id


# An address of the longest form with a prefix length.
_NETWORK = re.compile(r"[0-9A-Fa-f:.]{2,45}(/[0-9]{1,3})?")
# The prefix of ::ffff:0:0/96.
_MAPPED_PREFIX = 96
_UUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
