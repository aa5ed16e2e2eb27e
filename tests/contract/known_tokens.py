"""Tokens with known attributes, and a reference for filters and orders without SQL."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from latchkey_proto.v1 import token_service_pb2 as pb

from tests.contract.test_changes import timestamp

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.helpers.servers import Create

NEWEST, EXPIRY, LAST_USE = (
    pb.TOKEN_ORDER_NEWEST,
    pb.TOKEN_ORDER_EXPIRY,
    pb.TOKEN_ORDER_LAST_USE,
)
READ, WRITE = pb.SCOPE_READ, pb.SCOPE_WRITE
NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
# Answers are compared for all of these, in each order.
FILTERS: list[dict[str, Any]] = [
    {},
    {"scope": READ},
    {"scope": WRITE, "state": pb.TOKEN_STATE_ACTIVE},
    {"name_contains": "API"},
    {"search": "API 0"},
    {"label": {"team": "a"}},
    {"state": pb.TOKEN_STATE_ACTIVE},
    {"state": pb.TOKEN_STATE_DISABLED},
    {"state": pb.TOKEN_STATE_EXPIRED},
    {"expires_before": timestamp(NOW + 5 * DAY)},
    {"expires_before": timestamp(NOW + 5 * DAY), "state": pb.TOKEN_STATE_ACTIVE},
    {"unused_since": timestamp(NOW - 5 * DAY)},
    {"unused_since": timestamp(NOW - 2 * DAY), "never_used": False},
    {"never_used": True},
    {"never_used": True, "unused_since": timestamp(NOW - 5 * DAY)},
    {"never_used": False},
    {"never_expires": True},
    {"never_expires": False, "can_write": True},
    {"can_write": True},
    {"can_write": False},
    {"secret_created_before": timestamp(NOW - 5 * DAY)},
    {"leaked": True},
    {"leaked": False, "state": pb.TOKEN_STATE_ACTIVE},
]


@dataclass
class Known:
    """A token as the test made it. It does not change."""

    id: str
    name: str
    scope: int
    team: str
    created: datetime
    expires: datetime | None
    used: datetime | None
    disabled: bool
    renewed: datetime
    leaked: bool

    @property
    def expired(self) -> bool:
        return self.expires is not None and self.expires <= NOW

    @property
    def active(self) -> bool:
        return not self.disabled and not self.expired


def matches(token: Known, selected: dict[str, Any]) -> bool:
    """Decide about a token as the contract describes it, without SQL."""
    never = datetime.min.replace(tzinfo=UTC)
    time = {
        field: value.ToDatetime(UTC)
        for field, value in selected.items()
        if hasattr(value, "ToDatetime")
    }
    states = {
        pb.TOKEN_STATE_ACTIVE: token.active,
        pb.TOKEN_STATE_DISABLED: token.disabled,
        pb.TOKEN_STATE_EXPIRED: token.expired and not token.disabled,
    }
    tests: dict[str, Callable[[Any], bool]] = {
        "scope": lambda value: token.scope == value,
        "name_contains": lambda value: value.lower() in token.name.lower(),
        "search": lambda value: value.lower() in token.name.lower(),
        "label": lambda value: token.team == value["team"],
        "state": lambda value: states[value],
        "expires_before": lambda _: (
            token.expires is not None and token.expires < time["expires_before"]
        ),
        "unused_since": lambda _: (
            token.created < time["unused_since"] and (token.used or never) < time["unused_since"]
        ),
        "never_used": lambda value: (token.used is None) == value,
        "never_expires": lambda value: (token.expires is None) == value,
        "can_write": lambda value: (token.active and token.scope == WRITE) == value,
        "secret_created_before": lambda _: token.renewed < time["secret_created_before"],
        "leaked": lambda value: token.leaked == value,
    }
    return all(tests[field](value) for field, value in selected.items())


def ordered(tokens: list[Known], order: int, *, reverse: bool) -> list[str]:
    """Return the ids of tokens in an order, as the contract describes it."""
    first, last = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
    keys: dict[int, Callable[[Known], Any]] = {
        NEWEST: lambda token: (token.created, token.id),
        EXPIRY: lambda token: (token.expires or last, token.id),
        LAST_USE: lambda token: (token.used or first, token.id),
    }
    backwards = reverse != (order == NEWEST)
    return [token.id for token in sorted(tokens, key=keys[order], reverse=backwards)]


async def known_tokens(create: Create, connection: Any, count: int) -> list[Known]:
    """Create tokens with all combinations of attributes, and set their times in the database."""
    chosen = random.Random(7)  # noqa: S311 - for attributes, not for secrets
    found = []
    for number in range(count):
        name = f"{chosen.choice(['Api', 'job', 'web-API', 'x'])} {number:03}"
        scope, team = chosen.choice([READ, WRITE]), chosen.choice("ab")
        created = await create(name=name, scope=scope, labels={"team": team})
        # At noon, so that each is clearly before or after the times in filters. Some are equal.
        age = chosen.randrange(1, 9)
        time = NOW - age * DAY - DAY / 2
        known = Known(
            created.token.id,
            name,
            scope,
            team,
            time,
            chosen.choice([None, NOW + chosen.randrange(-3, 9) * DAY + DAY / 2]),
            chosen.choice([None, time + chosen.randrange(1, age + 1) * DAY]),
            chosen.random() < 0.2,
            chosen.choice([time, time + chosen.randrange(0, age) * DAY]),
            number % 5 == 0,
        )
        found.append(known)
        await connection.execute(
            "UPDATE token SET create_time = $2, expire_time = $3, disable_time = $4 WHERE id = $1",
            *(known.id, known.created, known.expires, NOW - DAY if known.disabled else None),
        )
        await connection.execute(
            "UPDATE secret SET create_time = $2, ordinal = $3, leak_report_time = $4"
            " WHERE token_id = $1",
            # As after a rotation, if it is younger than the token.
            *(known.id, known.renewed, int(known.renewed > known.created)),
            NOW if known.leaked else None,
        )
        if known.used is not None:
            await connection.execute(
                "INSERT INTO token_usage VALUES ($1, '', 'shop', $2, $2)", known.id, known.used
            )
    return found
