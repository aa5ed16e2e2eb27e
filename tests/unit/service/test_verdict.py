"""The order in which verdicts take precedence, checked against the words of the contract."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st
from latchkey_service.verdict import Scope, TokenRecord, Verdict, decide

NOW = datetime(2026, 1, 1, tzinfo=UTC)
offsets = st.none() | st.integers(-2, 2).map(lambda us: NOW + timedelta(microseconds=us))
records = st.none() | st.builds(
    TokenRecord,
    id=st.just("tok_1"),
    account_id=st.just("acme"),
    name=st.just("ci"),
    scope=st.sampled_from([Scope.READ, Scope.WRITE]),
    create_time=st.just(NOW),
    expire_time=offsets,
    hint=st.just("lk_…abcd"),
    delete_time=offsets,
)


@given(records, st.integers(-(2**31), 2**31 - 1))
def test_precedence(record, required_scope):
    """UNKNOWN, DELETED, EXPIRED, INSUFFICIENT_SCOPE, VALID: the first that applies."""
    applies = [
        (Verdict.UNKNOWN, record is None),
        (Verdict.DELETED, record is not None and record.delete_time is not None),
        (
            Verdict.EXPIRED,
            record is not None and record.expire_time is not None and record.expire_time <= NOW,
        ),
        (
            Verdict.INSUFFICIENT_SCOPE,
            record is not None
            and required_scope not in {0, 1, *([2] if record.scope is Scope.WRITE else [])},
        ),
        (Verdict.VALID, True),
    ]
    expected = next(verdict for verdict, holds in applies if holds)
    assert decide(record, required_scope, NOW) is expected
