"""Computes what a change makes of a token, and whether it narrows the token. Pure.

A change narrows a token if it can turn VALID into another verdict. If in doubt, it narrows: the
call then waits for verifiers needlessly, which is safe.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

from latchkey_coherence.rate import RateLimit
from latchkey_coherence.verdict import includes

from latchkey_service.errors import FailedPrecondition, FieldViolation
from latchkey_service.lifetime import UNLIMITED, Lifetime
from latchkey_service.tokens.lifecycle_store import Change, TokenState
from latchkey_service.tokens.validation import (
    LABELS_MAX,
    description_violations,
    expire_time_violations,
    label_violations,
    lifetime_violations,
    name_violations,
    networks_in,
    permissions_in,
    rate_limit_in,
    secret_violations,
)
from latchkey_service.tokens.verdict import Scope, TokenRecord, TokenSecret

__all__ = [
    "DECIDING",
    "NewValues",
    "decides_alike",
    "narrows",
    "require_new_rules",
    "secrets_after",
    "updated",
    "values_violations",
]

# The fields that a verdict depends on.
DECIDING = frozenset({"scope", "expire_time", "allowed_networks", "permissions", "rate_limit"})
_PATHS = DECIDING | {"name", "labels", "description"}
# More paths than fields. A request may repeat some.
_PATHS_MAX = 32


@dataclass(frozen=True, slots=True)
class NewValues:
    """The fields of an Update, not validated. Only those in `paths` count."""

    paths: Sequence[str]
    name: str = ""
    scope: int = 0
    expire_time: datetime | None = None
    labels: Mapping[str, str] | None = None
    description: str = ""
    allowed_networks: Sequence[str] = ()
    permissions: Sequence[str] = ()
    rate_limit: tuple[int, timedelta, int] | None = None
    """Count, period and burst."""


def values_violations(
    new: NewValues, now: datetime, lifetime: Lifetime = UNLIMITED
) -> list[FieldViolation]:
    """Check the paths and the fields that they list. Names the fields as in the request."""
    if not new.paths:
        return [FieldViolation("update_mask", "is required")]
    if len(new.paths) > _PATHS_MAX or not _PATHS.issuperset(new.paths):
        return [FieldViolation("update_mask", f"may list {', '.join(sorted(_PATHS))}")]
    labels = new.labels or {}
    found: list[FieldViolation] = []
    if "name" in new.paths:
        found += name_violations(new.name.strip())
        found += secret_violations([("name", new.name.strip())])
    if "scope" in new.paths and new.scope not in (Scope.READ, Scope.WRITE):
        found.append(FieldViolation("scope", "must be SCOPE_READ or SCOPE_WRITE"))
    if "expire_time" in new.paths:
        found += expire_time_violations(new.expire_time, now) or lifetime_violations(
            "expire_time", new.expire_time, lifetime, now
        )
    if "labels" in new.paths:
        found += label_violations(labels)
        if len(labels) <= LABELS_MAX:
            found += secret_violations(("labels", text) for pair in labels.items() for text in pair)
    if "description" in new.paths:
        found += description_violations(new.description)
        found += secret_violations([("description", new.description)])
    if "allowed_networks" in new.paths:
        networks_in(new.allowed_networks, found)
    if "permissions" in new.paths:
        permissions_in(new.permissions, found)
    if "rate_limit" in new.paths:
        rate_limit_in(new.rate_limit, found)
    return [replace(v, field=f"token.{v.field}") for v in found]


def updated(old: TokenRecord, new: NewValues) -> TokenRecord:
    """Return the token after an Update whose values are valid."""
    values: dict[str, Any] = {
        "name": new.name.strip(),
        "scope": Scope(new.scope) if "scope" in new.paths else old.scope,
        "expire_time": new.expire_time,
        "labels": dict(new.labels or {}),
        "description": new.description,
        "allowed_networks": networks_in(new.allowed_networks, []),
        "permissions": permissions_in(new.permissions, []),
        "rate_limit": rate_limit_in(new.rate_limit, []),
    }
    return old._replace(**{path: values[path] for path in new.paths})


def decides_alike(old: TokenRecord, new: TokenRecord) -> bool:
    """Return whether both have the same values in the fields that a verdict depends on."""
    return (
        old.scope == new.scope
        and old.expire_time == new.expire_time
        and (old.disable_time is None) == (new.disable_time is None)
        and old.allowed_networks == new.allowed_networks
        and old.permissions == new.permissions
        and old.rate_limit == new.rate_limit
    )


def narrows(old: TokenRecord, new: TokenRecord) -> bool:
    """Return whether some verify that is VALID for `old` may not be VALID for `new`."""
    return (
        new.scope < old.scope
        or (
            new.expire_time is not None
            and (old.expire_time is None or new.expire_time < old.expire_time)
        )
        or (new.disable_time is not None and old.disable_time is None)
        or not includes(frozenset(new.permissions), old.permissions)
        or not _covers(new.allowed_networks, old.allowed_networks)
        or _limits_more(new.rate_limit, old.rate_limit)
    )


def secrets_after(state: TokenState, change: Change, moment: datetime) -> tuple[TokenSecret, ...]:
    """Return the token's secrets after a change at `moment`, newest first, as owners see them.

    As Get does, these are the secrets that work, and the newest one in any case.
    """
    ends = {secret.digest: secret.expire_time for secret in change.kept}
    shown = []
    if change.minted is not None and change.minted_at is not None:
        shown.append(
            TokenSecret(
                change.minted_hint, change.minted_at, None, change.minted.retire_on_first_use
            )
        )
    elif state.record.secrets and (
        not state.secrets or state.secrets[0].record.ordinal != state.newest_ordinal
    ):
        # The newest one was revoked.
        shown.append(state.record.secrets[0])
    for stored in state.secrets:
        end = ends.get(stored.record.digest, stored.record.expire_time)
        if stored.record.digest in change.retired:
            end = moment if end is None else min(end, moment)
        if end is None or end > moment or not shown:
            shown.append(stored.shown._replace(expire_time=end))
    return tuple(shown)


def require_new_rules(*, old_verifiers: bool) -> None:
    """Raise FailedPrecondition if a verifier is registered that would not respect a change."""
    if old_verifiers:
        raise FailedPrecondition(
            "A server of an earlier release is still running and would not respect this change. "
            "Upgrade all servers first."
        )


def _limits_more(new: RateLimit | None, old: RateLimit | None) -> bool:
    """Return whether `new` may refuse a verify that `old` permits."""
    if new is None:
        return False
    if old is None:
        return True
    # Compared as whole numbers, which are exact.
    slower = new.calls * old.period_seconds < old.calls * new.period_seconds
    return slower or new.burst < old.burst


def _covers(new: Sequence[str], old: Sequence[str]) -> bool:
    """Return whether `new` is certain to permit each address that `old` permits."""
    if not new:
        return True
    if not old:
        return False
    wide = [ip_network(text) for text in new]
    return all(any(_within(ip_network(text), network) for network in wide) for text in old)


def _within(part: IPv4Network | IPv6Network, whole: IPv4Network | IPv6Network) -> bool:
    # subnet_of raises TypeError for networks of two versions.
    if isinstance(part, IPv4Network):
        return isinstance(whole, IPv4Network) and part.subnet_of(whole)
    return isinstance(whole, IPv6Network) and part.subnet_of(whole)
