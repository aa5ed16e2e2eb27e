"""Limits on how long tokens may live."""

from datetime import UTC, datetime, timedelta

import pytest
from latchkey_service.errors import InvalidArgument, status_of
from latchkey_service.lifetime import UNLIMITED, Lifetime, LifetimeRules, duration_in, in_words
from latchkey_service.tokens.validation import (
    CLOCK_TOLERANCE,
    check,
    grace_violations,
    lifetime_violations,
)

NOW = datetime(2026, 6, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def test_strictest_limit_of_caller_and_accounts_applies() -> None:
    """A rule for an account or a prefix can only add to the caller's limit, and the setting's."""
    accounts = {
        "acme": Lifetime(30 * DAY),
        "team-*": Lifetime(60 * DAY),
        "team-red*": Lifetime(require_expiry=True),
        "team-red": Lifetime(200 * DAY),
    }
    rules = LifetimeRules(Lifetime(90 * DAY), accounts)
    assert rules.limit("acme") == Lifetime(30 * DAY)
    assert rules.limit("acme2") == rules.limit("") == Lifetime(90 * DAY)
    assert rules.limit("team-") == rules.limit("team-blue") == Lifetime(60 * DAY)
    assert rules.limit("team-red") == Lifetime(60 * DAY, require_expiry=True)
    assert LifetimeRules(accounts=accounts).limit("other") == UNLIMITED
    assert LifetimeRules().limit("acme").stricter(Lifetime(DAY)) == Lifetime(DAY)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("90d", "90 days"),
        ("1w", "7 days"),
        ("24h", "1 day"),
        ("36h", "36 hours"),
        ("90m", "90 minutes"),
        ("60s", "1 minute"),
        ("61s", "61 seconds"),
        ("36500d", "36,500 days"),
    ],
)
def test_durations(text: str, words: str) -> None:
    """Durations are read as the command line reads them, and shown without a fraction."""
    assert in_words(duration_in(text)) == words


@pytest.mark.parametrize(
    "text", ["", "90", "d", "0d", "-1d", "1.5d", "90 d", "36501d", "9D", "\u0669d"]
)
def test_invalid_durations(text: str) -> None:
    """A limit that would not limit anything, or that cannot be read, is refused."""
    with pytest.raises(ValueError, match="must be a duration"):
        duration_in(text)


def test_expiry_within_the_limit() -> None:
    """The limit itself is allowed, and so is a client's clock that is a little ahead."""
    limit = Lifetime(90 * DAY)
    for expiry in (NOW + DAY, NOW + 90 * DAY, NOW + 90 * DAY + CLOCK_TOLERANCE):
        assert not lifetime_violations("expire_time", expiry, limit, NOW)
    for never in (None, NOW + 10_000 * DAY):
        assert not lifetime_violations("expire_time", never, UNLIMITED, NOW)
    assert not lifetime_violations("ttl", NOW + 10_000 * DAY, Lifetime(require_expiry=True), NOW)
    assert not grace_violations(90 * DAY, limit)
    assert not grace_violations(365 * DAY, UNLIMITED)


def test_refusal_states_the_limit() -> None:
    """The error has a reason and the limit for programs, and the limit in words for people."""
    second = timedelta(seconds=1)
    limit = Lifetime(90 * DAY)
    late = NOW + 90 * DAY + CLOCK_TOLERANCE + second
    for violations, reason in (
        (lifetime_violations("expire_time", None, limit, NOW), "EXPIRY_REQUIRED"),
        (lifetime_violations("expire_time", late, limit, NOW), "EXPIRY_TOO_LATE"),
        (grace_violations(91 * DAY, limit), "EXPIRY_TOO_LATE"),
    ):
        with pytest.raises(InvalidArgument) as raised:
            check(*violations)
        assert "at most 90 days" in str(raised.value)
        assert raised.value.reason == reason
        assert raised.value.metadata == {"max_ttl_seconds": str(90 * 86_400)}
        assert status_of(raised.value, "r").reason == reason
    (required,) = lifetime_violations("ttl", None, Lifetime(require_expiry=True), NOW)
    assert required.reason == "EXPIRY_REQUIRED"
    assert required.metadata == ()
