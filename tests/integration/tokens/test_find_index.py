"""Find among many tokens: each page costs one range of an index."""

import json
from typing import Any

import pytest
from latchkey_service.tokens.find_store import BY_HINT, BY_ID

from tests.helpers.databases import session

# Enough that the planner prefers an index, as with a million rows, and few enough to insert in a
# second.
TOKENS = 20_000


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a plan's nodes."""
    return [plan, *(inner for child in plan.get("Plans", ()) for inner in nodes(child))]


@pytest.mark.parametrize("analyzed", [True, False])
async def test_find_reads_only_what_it_returns(database_url: str, *, analyzed: bool) -> None:
    """With and without statistics, a search reads neither all tokens nor all secrets, whatever the
    number of tokens with the hint, and each page reads only its own part of the index."""
    async with session(database_url) as connection:
        await connection.execute(
            f"""
            INSERT INTO token (id, account_id, name, name_key, scope, create_time, hint)
            SELECT 'tok_' || lpad(n::text, 26, '0'), 'a' || n % 100, 'n' || n, 'n' || n, 1,
                   timestamptz '2026-01-01' + n * interval '1 second',
                   'lk_…' || CASE WHEN n % 4 = 0 THEN 'Same' ELSE lpad(n::text, 4, '0') END
              FROM generate_series(1, {TOKENS}) n
            """  # noqa: S608 - a constant
        )
        await connection.execute("INSERT INTO pepper (id) VALUES ('p')")
        await connection.execute(
            """
            INSERT INTO secret (digest, pepper_id, token_id, hint)
            SELECT sha256(t.id::bytea), 'p', t.id, t.hint FROM token t
            """
        )
        if analyzed:
            await connection.execute("ANALYZE")
        for query, arguments, most in (
            (BY_ID, (f"tok_{1:026}",), 1),
            (BY_HINT, ("0001", "", "~", 51), 51),
            (BY_HINT, ("same", "", "~", 51), 51),
            (BY_HINT, ("same", "lk_…same", f"tok_{TOKENS // 2:026}", 51), 51),
        ):
            explained = await connection.fetchval(
                f"EXPLAIN (ANALYZE, FORMAT JSON) {query}", *arguments
            )
            (plan,) = json.loads(explained)
            for node in nodes(plan["Plan"]):
                if node.get("Relation Name") not in ("token", "secret"):
                    continue
                assert node["Node Type"] != "Seq Scan", node
                read = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
                # A quarter of the secrets have the hint. The planner may skip over the others.
                assert read * node["Actual Loops"] <= 4 * most, (arguments, node)
