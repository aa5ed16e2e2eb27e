"""The review that the service counts and the findings in the rows agree, on the real service."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import latchkey
import pytest
from latchkey import Scope
from latchkey_console import listing
from latchkey_console.listing import Filter
from latchkey_console.review import Kind

from tests.helpers.waiting import WAIT_SECONDS

DAY = timedelta(days=1)
NOW = datetime.now(UTC)


@pytest.fixture
def transport() -> str:
    """The console cannot tell the transports apart, so one is enough here."""
    return "native"


async def test_counts_are_the_findings_of_all_rows(address: str, shared_servers: Any) -> None:
    """For tokens of every age, expiry, scope, state and use, each count is the number of rows with
    that finding, and each review lists exactly those rows."""
    _, connection = await shared_servers("native")
    ages, expiries = (1, 8, 91, 181), (None, -1, 13, 15)
    async with latchkey.Client(address, timeout_seconds=WAIT_SECONDS) as client:
        for number in range(len(ages) * len(expiries) * 4):
            age = ages[number % 4] * DAY
            expiry = expiries[number // 4 % 4]
            used = (None, age / 2, min(age, 92 * DAY), age)[number // 16]
            scope = Scope.WRITE if number % 3 else Scope.READ
            created = await client.create("acme", f"token {number}", scope)
            token_id = created.token.id
            if number % 5 == 0:
                await client.disable("acme", token_id)
            await connection.execute(
                "UPDATE token SET create_time = $2, expire_time = $3 WHERE id = $1",
                *(token_id, NOW - age, None if expiry is None else NOW + expiry * DAY),
            )
            if number % 11 == 0:
                await client.report_secrets([created.secret])
            renewed = NOW - (age if number % 7 else DAY / 2)
            await connection.execute(
                "UPDATE secret SET create_time = $2, ordinal = 1 WHERE token_id = $1",
                *(token_id, renewed),
            )
            if used is not None:
                await connection.execute(
                    "INSERT INTO token_usage VALUES ($1, '', 'shop', $2, $2)", token_id, NOW - used
                )
        now = NOW + timedelta(seconds=1)
        listed = await listing.fetch(client, "acme", Filter(rows=500), now)
        assert listed.use_recorded
        found = {
            kind: {token.id for token in listed.rows if kind in listed.kinds(token)}
            for kind in Kind
        }
        assert all(found.values()), "each kind occurs"
        assert [finding.kind for finding in listed.findings] == list(Kind)
        for finding in listed.findings:
            assert finding.count == len(found[finding.kind]), finding.kind
            shown = await listing.fetch(client, "acme", Filter(kind=finding.kind, rows=500), now)
            assert {token.id for token in shown.rows} == found[finding.kind], finding.kind
            assert finding.first == shown.rows[0]
            assert shown.matching.number == finding.count
