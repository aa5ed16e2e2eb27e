"""Limits on how long tokens may live, as the settings and the policy state them. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, NamedTuple

__all__ = ["NO_RULES", "UNLIMITED", "Lifetime", "LifetimeRules", "duration_in", "in_words"]

_DURATION: Final = re.compile(r"([0-9]{1,6})([smhdw])")
_UNITS: Final = {
    "s": timedelta(seconds=1),
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
    "w": timedelta(weeks=1),
}
# As long as `tombstone_retention_days` may be. A longer limit would not limit anything.
DURATION_MAX: Final = timedelta(days=36_500)


class Lifetime(NamedTuple):
    """A limit on how long tokens live. `max_ttl` None: any time.

    `require_expiry` rejects a token without an expiry even then.
    """

    max_ttl: timedelta | None = None
    require_expiry: bool = False

    @property
    def requires_expiry(self) -> bool:
        """Whether a token needs an expiry. A token without one lives longer than any limit."""
        return self.require_expiry or self.max_ttl is not None

    def stricter(self, other: "Lifetime") -> "Lifetime":
        """Return the limit that enforces both."""
        if other == UNLIMITED:
            return self
        both = [ttl for ttl in (self.max_ttl, other.max_ttl) if ttl is not None]
        return Lifetime(min(both, default=None), self.require_expiry or other.require_expiry)


UNLIMITED: Final = Lifetime()


@dataclass(frozen=True, slots=True)
class LifetimeRules:
    """The limits in a policy that can apply to one caller."""

    caller: Lifetime = UNLIMITED
    accounts: Mapping[str, Lifetime] = field(default_factory=dict)
    """By account, or by prefix with a `*` at the end."""

    def limit(self, account_id: str) -> Lifetime:
        """Return the strictest of the limits that apply to an account, which may be invalid."""
        found = self.caller
        if self.accounts:
            # A policy may list more accounts than an id has prefixes.
            prefixes = [f"{account_id[:end]}*" for end in range(1, len(account_id) + 1)]
            for account in (account_id, *prefixes):
                found = found.stricter(self.accounts.get(account, UNLIMITED))
        return found


NO_RULES: Final = LifetimeRules()


def duration_in(text: str) -> timedelta:
    """Parse a duration such as 90d, 12h or 30m. Raises ValueError."""
    match = _DURATION.fullmatch(text)
    duration = int(match[1]) * _UNITS[match[2]] if match else timedelta()
    if not timedelta() < duration <= DURATION_MAX:
        raise ValueError("must be a duration such as 90d, 12h or 30m, and at most 36500d")
    return duration


def in_words(duration: timedelta) -> str:
    """Return a duration in the largest unit that needs no fraction, such as "90 days"."""
    words = {"day": "d", "hour": "h", "minute": "m", "second": "s"}
    word = next(word for word, unit in words.items() if not duration % _UNITS[unit])
    number = duration // _UNITS[words[word]]
    return f"{number:,} {word}{'' if number == 1 else 's'}"
