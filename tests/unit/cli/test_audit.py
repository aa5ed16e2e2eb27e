"""What the table of audit entries shows of the trace of a call."""

from datetime import UTC, datetime

from latchkey import AuditEntry, Outcome
from latchkey_cli.audit import _row


def entry(trace_id: str) -> AuditEntry:
    return AuditEntry(
        *("1", datetime(2026, 1, 1, tzinfo=UTC), "shop", "/s/Get", "acme", "tok_1"),
        *("ipv4:127.0.0.1:1", "r", Outcome.OK, 0, "", 1),
        trace_id=trace_id,
    )


def test_a_row_names_the_trace() -> None:
    """A row shows the whole trace id below the address, so that it can be copied. Other calls have
    no such line.
    """
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    assert f"ipv4:127.0.0.1:1\ntrace {trace}" in [cell.plain for cell in _row(entry(trace))]
    assert "ipv4:127.0.0.1:1" in [cell.plain for cell in _row(entry(""))]
