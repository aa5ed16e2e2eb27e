"""The decision that both guards share."""

import asyncio
import logging
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latchkey import Scope, Secret, Token, Unavailable, Verdict, Verification
from latchkey.guards._decision import (
    Decision,
    Outcome,
    checked_permissions,
    checked_scope,
    decide,
)

SECRET = "lk" + "_" + "S3cr3t" * 9 + "abc"
TOKEN = Token(
    id="t1",
    account_id="acme",
    name="ci",
    scope=Scope.READ,
    create_time=datetime(2026, 1, 1, tzinfo=UTC),
)


class Stub:
    """A verifier that returns or raises a given object."""

    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.asked: list[tuple[str, Scope | None, float | None]] = []
        self.restrictions: list[tuple[str, tuple[str, ...]]] = []

    async def verify(
        self,
        secret: Secret,
        scope: Scope | None,
        /,
        *,
        client_address: str = "",
        permissions: Collection[str] = (),
        timeout_seconds: float | None = None,
    ) -> Verification:
        self.asked.append((secret.reveal(), scope, timeout_seconds))
        self.restrictions.append((client_address, tuple(permissions)))
        if isinstance(self.answer, BaseException):
            raise self.answer
        return cast("Verification", self.answer)


def valid() -> Stub:
    return Stub(Verification(verdict=Verdict.VALID, token=TOKEN, revision=1))


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR"])
@pytest.mark.parametrize("spaces", [" ", "  ", "   "])
@pytest.mark.parametrize("end", ["", " ", " \t "])
async def test_a_valid_token_is_accepted(scheme: str, spaces: str, end: str) -> None:
    """The verifier receives the secret from RFC 6750's header, in any letter case of the scheme,
    without the white space around it."""
    verifier = valid()
    decision = await decide(verifier, [scheme + spaces + SECRET + end], Scope.WRITE, 0.5)
    assert decision == Decision(Outcome.ALLOWED, token=TOKEN)
    assert verifier.asked == [(SECRET, Scope.WRITE, 0.5)]


@pytest.mark.parametrize(
    "values", [[], ["Basic dXNlcjpwYXNz"], [""], [SECRET], ["Bearerx " + SECRET]]
)
async def test_request_without_bearer_token_is_refused(values: list[str]) -> None:
    """Without a bearer token, the verifier is not asked and the request is refused."""
    verifier = valid()
    assert (await decide(verifier, values, None)).outcome is Outcome.MISSING
    assert verifier.asked == []


@pytest.mark.parametrize(
    "values",
    [
        ["Bearer"],
        ["Bearer "],
        ["Bearer\t" + SECRET, "Bearer " + SECRET],
        ["Bearer " + SECRET, "Bearer " + SECRET],
        ["Bearer " + SECRET, "Basic x"],
        ["Basic x", "Bearer " + SECRET],
        ["Bearer a b"],
        ["Bearer " + SECRET + " x"],
        ["Bearer " + SECRET + "\n"],
        ["Bearer " + SECRET + ", Bearer " + SECRET],
        ["Bearer \u00e4\u00f6\u00fc"],
        ["Bearer \ufffd\x00"],
        ["Bearer =" + SECRET],
        ["Bearer " + "\u212a" + SECRET],  # the Kelvin sign, which matches "k" if case is ignored
    ],
)
async def test_a_malformed_header_is_invalid(values: list[str]) -> None:
    """Only exactly one well-formed value is verified, never a part of a value."""
    verifier = valid()
    assert (await decide(verifier, values, None)).outcome is Outcome.INVALID
    assert verifier.asked == []


@given(st.lists(st.text(max_size=80) | st.text(max_size=60).map("Bearer {}".format), max_size=3))
@settings(deadline=None)  # the machine may be busy
async def test_no_header_breaks_the_decision(values: list[str]) -> None:
    """Any header values lead to an outcome, and an unknown secret is never accepted."""
    stub = Stub(Verification(verdict=Verdict.UNKNOWN))
    decision = await decide(stub, values, None)
    assert decision.outcome in (Outcome.MISSING, Outcome.INVALID)


@pytest.mark.parametrize("verdict", [v for v in Verdict if v is not Verdict.VALID])
async def test_only_valid_is_accepted(verdict: Verdict) -> None:
    """All other verdicts are refused, with or without a token."""
    decision = await decide(
        Stub(Verification(verdict=verdict, token=TOKEN)), ["Bearer " + SECRET], Scope.READ
    )
    live = {
        Verdict.INSUFFICIENT_SCOPE: Outcome.FORBIDDEN,
        Verdict.INSUFFICIENT_PERMISSIONS: Outcome.UNPERMITTED,
        Verdict.ADDRESS_NOT_ALLOWED: Outcome.WRONG_ADDRESS,
        Verdict.RATE_LIMITED: Outcome.RATE_LIMITED,
    }
    assert decision == Decision(live.get(verdict, Outcome.INVALID))


async def test_address_and_permissions_reach_the_verifier() -> None:
    """The verifier decides about the client's address and the required permissions."""
    verifier = valid()
    await decide(
        verifier,
        ["Bearer " + SECRET],
        None,
        client_address="192.0.2.1",
        permissions=("orders:read",),
    )
    await decide(verifier, ["Bearer " + SECRET], None)
    assert verifier.restrictions == [("192.0.2.1", ("orders:read",)), ("", ())]


@pytest.mark.parametrize(
    "answer",
    [
        Unavailable("down", retry_after=timedelta(seconds=3)),
        RuntimeError(SECRET),
        TimeoutError(),
        None,
        True,
        "VALID",
        object(),
    ],
)
async def test_any_error_is_refused(answer: object, caplog: pytest.LogCaptureFixture) -> None:
    """Any exception or invalid answer is refused, and logged without the secret."""
    caplog.set_level(logging.DEBUG)
    decision = await decide(Stub(answer), ["Bearer " + SECRET], Scope.READ)
    assert decision.outcome is Outcome.UNAVAILABLE
    assert decision.token is None
    assert "S3cr3t" not in caplog.text
    assert caplog.records


async def test_valid_without_a_token_is_refused() -> None:
    """A verdict VALID without a token does not identify an account."""
    stub = Stub(Verification(verdict=Verdict.VALID))
    assert (await decide(stub, ["Bearer " + SECRET], None)).outcome is not Outcome.ALLOWED


async def test_cancellation_passes_through() -> None:
    """A cancelled request raises CancelledError and gets no decision."""
    with pytest.raises(asyncio.CancelledError):
        await decide(Stub(asyncio.CancelledError()), ["Bearer " + SECRET], None)


@pytest.mark.parametrize("scope", ["read", 1, Scope.UNSPECIFIED, Verdict.VALID])
def test_an_invalid_scope_is_rejected_at_construction(scope: Any) -> None:
    """A guard that would require no scope by mistake cannot be created."""
    with pytest.raises((TypeError, ValueError)):
        checked_scope(scope)


@pytest.mark.parametrize(
    "permissions",
    [
        "orders:read",
        ["orders"],
        ["orders:"],
        ["Orders:read"],
        ["orders:read\n"],
        ["*:read"],
        [b"orders:read"],
        ["a:b"] * 65,
    ],
)
def test_an_invalid_permission_is_rejected_at_construction(permissions: Any) -> None:
    """A guard that would refuse every request because of a typing error cannot be created."""
    with pytest.raises((TypeError, ValueError)):
        checked_permissions(permissions)
    assert checked_permissions({"orders:*"}) == ("orders:*",)
