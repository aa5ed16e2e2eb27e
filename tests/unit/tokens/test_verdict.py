"""The precedence of verdicts, as the contract defines it."""

import math

from hypothesis import given
from hypothesis import strategies as st
from latchkey_service.tokens.verdict import CachedToken, Scope, Verdict, decide

NOW = 1_800_000_000.0
records = st.none() | st.builds(
    CachedToken,
    token_id=st.just("tok_1"),
    account_id=st.just("acme"),
    scope=st.sampled_from([Scope.READ, Scope.WRITE]),
    expires=st.just(math.inf) | st.integers(-2, 2).map(lambda us: NOW + us / 1e6),
    token=st.just(b""),
    deleted=st.booleans(),
)


@given(records, st.integers(-(2**31), 2**31 - 1))
def test_precedence(record, required_scope):
    """UNKNOWN, DELETED, EXPIRED, INSUFFICIENT_SCOPE, VALID: the first that applies."""
    applies = [
        (Verdict.UNKNOWN, record is None),
        (Verdict.DELETED, record is not None and record.deleted),
        (Verdict.EXPIRED, record is not None and record.expires <= NOW),
        (
            Verdict.INSUFFICIENT_SCOPE,
            record is not None
            and required_scope not in {0, 1, *([2] if record.scope is Scope.WRITE else [])},
        ),
        (Verdict.VALID, True),
    ]
    expected = next(verdict for verdict, holds in applies if holds)
    assert decide(record, required_scope, NOW) is expected
