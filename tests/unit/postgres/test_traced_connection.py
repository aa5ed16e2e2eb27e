"""What the span of a statement says about it."""

import pytest
from latchkey_service.postgres.traced_connection import summary_of
from latchkey_service.tokens.token_table import FIND_BY_DIGEST


@pytest.mark.parametrize(
    ("query", "name", "changes"),
    [
        (FIND_BY_DIGEST, "SELECT token", "SELECT token"),
        ("COMMIT;", "COMMIT", "COMMIT"),
        ("SELECT 1", "SELECT", "SELECT"),
        ("SELECT pg_notify($1, $2)", "SELECT", "SELECT"),
        ("SELECT x FROM unnest($1) u JOIN verifier v ON true", "SELECT verifier", None),
        ("SELECT * FROM audit FOR UPDATE SKIP LOCKED", "SELECT audit", None),
        ("INSERT INTO rate_use AS u ON CONFLICT DO UPDATE SET a = 1", "INSERT rate_use", None),
        ("-- UPDATE x\nDELETE FROM expiry_notice", "DELETE expiry_notice", None),
        (
            "WITH h AS (UPDATE head SET a = 1), t AS (UPDATE token t SET b = 2) INSERT INTO audit",
            "UPDATE token",
            "UPDATE head UPDATE token INSERT audit",
        ),
        ("", "", ""),
    ],
)
def test_summary(query: str, name: str, changes: str | None) -> None:
    """A statement is named after what it does to tokens, else after its first table."""
    found = summary_of(query)
    assert found.name == name
    assert found.changes == (name if changes is None else changes)


def test_a_summary_is_bounded() -> None:
    """A summary has at most 255 characters, as the semantic conventions recommend."""
    assert len(summary_of("INSERT INTO audit " * 99).changes) == 255
