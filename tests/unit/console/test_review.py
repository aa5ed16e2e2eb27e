"""The review of tokens: each rule at its bounds."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from latchkey import Scope, Token, TokenSecret
from latchkey_console.review import NEVER_USED, OLD, SOON, UNUSED, Kind, findings_of

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def token(**fields: Any) -> Token:
    """A token without findings, except for the fields that a test changes."""
    values: dict[str, Any] = {
        "id": "tok_1",
        "account_id": "acme",
        "name": "fine",
        "scope": Scope.READ,
        "create_time": NOW - timedelta(days=1),
        "expire_time": NOW + timedelta(days=90),
    }
    return Token(**values | fields)


def secret(days: int, *, leaked: bool = False) -> TokenSecret:
    """A secret of this age."""
    return TokenSecret(
        hint="lk_…aB3x",
        create_time=NOW - timedelta(days=days),
        leak_report_time=NOW if leaked else None,
    )


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, []),
        ({"expire_time": None}, [Kind.NEVER_EXPIRES]),
        ({"expire_time": NOW + SOON + SECOND}, []),
        ({"expire_time": NOW + SOON}, [Kind.EXPIRES_SOON]),
        ({"expire_time": NOW + SECOND}, [Kind.EXPIRES_SOON]),
        ({"expire_time": NOW}, [Kind.EXPIRED]),
        ({"expire_time": NOW - SECOND, "scope": Scope.WRITE}, [Kind.EXPIRED]),
        ({"create_time": NOW - OLD}, []),
        ({"create_time": NOW - OLD - SECOND}, [Kind.OLD]),
        ({"create_time": NOW - OLD - SECOND, "secrets": (secret(1), secret(200))}, []),
        ({"create_time": NOW - OLD, "secrets": (secret(181),)}, [Kind.OLD]),
        ({"disable_time": NOW, "scope": Scope.WRITE, "expire_time": None}, []),
        ({"disable_time": NOW, "expire_time": NOW}, [Kind.EXPIRED]),
        ({"scope": Scope.WRITE}, [Kind.WRITE]),
        ({"secrets": (secret(1, leaked=True),)}, [Kind.LEAKED]),
        ({"secrets": (secret(0), secret(1, leaked=True))}, [Kind.LEAKED]),
        ({"secrets": (secret(1, leaked=True),), "disable_time": NOW}, []),
        ({"secrets": (secret(1, leaked=True),), "expire_time": NOW}, [Kind.EXPIRED]),
        ({"scope": Scope.UNSPECIFIED}, [Kind.WRITE]),
        ({"last_used_time": NOW - UNUSED}, []),
        ({"last_used_time": NOW - UNUSED - SECOND}, [Kind.UNUSED]),
    ],
)
def test_findings(fields: dict[str, Any], found: list[Kind]) -> None:
    """Each rule applies from its bound on and not before."""
    assert findings_of(token(**fields), NOW, use_recorded=False) == found


def test_never_used_only_where_use_is_recorded() -> None:
    """An unused token is a finding after a week, if the service records use."""
    week_old = token(create_time=NOW - NEVER_USED - SECOND)
    assert findings_of(week_old, NOW, use_recorded=True) == [Kind.NEVER_USED]
    assert findings_of(week_old, NOW, use_recorded=False) == []
    assert findings_of(token(create_time=NOW - NEVER_USED), NOW, use_recorded=True) == []


def test_every_kind_has_a_title_and_a_reason() -> None:
    """Each kind has a title, a sentence with the reason, and a remedy."""
    for kind in Kind:
        assert kind.title
        assert kind.why.endswith(".")
        assert kind.remedies
        for act, label in kind.remedies:
            assert act in ("replace", "edit", "delete")
            assert label
