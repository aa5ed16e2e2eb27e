"""What `find` shows of tokens of any account."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from latchkey import FoundToken, Scope, Token
from latchkey_cli import find

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


def found(delete_time: datetime | None = None, **fields: Any) -> FoundToken:
    token = Token(
        id="tok_1", account_id="acme", name="ci", scope=Scope.READ, create_time=NOW, **fields
    )
    return FoundToken(token=token, delete_time=delete_time)


@pytest.mark.parametrize(
    ("one", "state"),
    [
        (found(), "active"),
        (found(expire_time=NOW + timedelta(days=1)), "active"),
        (found(expire_time=NOW), "expired"),
        (found(disable_time=NOW, expire_time=NOW), "disabled"),
        (found(NOW - timedelta(hours=3), disable_time=NOW), "deleted 3 hours ago"),
    ],
)
def test_state_says_why_a_token_does_not_work(one: FoundToken, state: str) -> None:
    """Deleted comes before disabled, and disabled before expired."""
    assert find._state(one, NOW).plain == state


def test_table_shows_each_token(capsys: pytest.CaptureFixture[str]) -> None:
    """Each token has a line with its account, hint and last use."""
    named = found(hint="lk_…abcd", last_used_time=datetime.now(UTC) - timedelta(days=2))
    find._print([named, found()])
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.split() == ["ID", "Account", "Name", "Hints", "State", "Last", "used"]
    assert second.split() == ["tok_1", "acme", "ci", "lk_…abcd", "active", "2", "days", "ago"]
    assert third.split()[-1] == "never"
