"""Seals: each field that decides is covered, and nothing else makes a seal right. Pure."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latchkey_coherence.rate import RateLimit
from latchkey_service.errors import StoreUnavailable
from latchkey_service.secret_format import Keyring, Pepper
from latchkey_service.tokens.seal import Sealer, SealGuard, TokenSeal
from latchkey_service.tokens.verdict import Scope, SecretRecord, TokenRecord

OLD, NEW = Pepper(b"o" * 32), Pepper(b"n" * 32)
KEYRING = Keyring([NEW, OLD])
NOW = datetime(2026, 1, 1, tzinfo=UTC)
INFINITY = datetime.max  # noqa: DTZ901 - as the driver returns it
TOKEN = TokenRecord(
    *("tok_1", "acme", "ci", Scope.READ, NOW, NOW + timedelta(1), "lk_…abcd"),
    allowed_networks=("10.0.0.0/8", "::/0"),
    permissions=("a:b", "c:d"),
    rate_limit=RateLimit(100, 60, 20),
)
SECRET = SecretRecord(b"d" * 32, NEW.id, NOW, None, False, None)
SEALER = Sealer(KEYRING.peppers)
CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"id": "tok_2"}, {}),
    ({"account_id": "other"}, {}),
    ({"scope": Scope.WRITE}, {}),
    ({"expire_time": None}, {}),
    ({"expire_time": INFINITY}, {}),
    ({"expire_time": NOW + timedelta(1, microseconds=1)}, {}),
    ({"disable_time": NOW}, {}),
    ({"allowed_networks": ()}, {}),
    ({"allowed_networks": ("10.0.0.0/8",)}, {}),
    ({"permissions": ("a:b",)}, {}),
    ({"permissions": ("a:b", "c:*")}, {}),
    ({"rate_limit": None}, {}),
    ({"rate_limit": RateLimit(101, 60, 20)}, {}),
    ({"rate_limit": RateLimit(100, 1, 20)}, {}),
    ({"rate_limit": RateLimit(100, 60, 21)}, {}),
    # The same texts in other fields, or split in other places.
    ({"allowed_networks": (), "permissions": ("10.0.0.0/8", "::/0", "a:b", "c:d")}, {}),
    ({"permissions": ('a:b", "c:d',)}, {}),
    ({}, {"digest": b"e" * 32}),
    ({}, {"expire_time": None}),
    ({}, {"expire_time": INFINITY}),
    ({}, {"expire_time": NOW + timedelta(1)}),
    ({}, {"retire_on_first_use": True}),
    ({}, {"pepper_id": OLD.id}),
    ({}, {"ordinal": 1}),
]


def sealed(secret: SecretRecord, token: TokenRecord = TOKEN) -> SecretRecord:
    return secret._replace(seal=SEALER.seal(token, secret))


@pytest.mark.parametrize("changes", CHANGES)
def test_each_deciding_field_is_sealed(changes):
    """A seal is wrong for a row that differs in any field that decides."""
    of_token, of_secret = changes
    stored = sealed(SECRET)
    assert SEALER.is_genuine(TOKEN, stored)
    assert not SEALER.is_genuine(TOKEN._replace(**of_token), stored._replace(**of_secret))


def test_seal_of_a_token_without_a_limit_is_that_of_earlier_releases():
    """Rows that were sealed before rate limits existed stay genuine."""
    token = TOKEN._replace(rate_limit=None)
    earlier = "8adf1a58"
    seal = SEALER.seal(token, SECRET)
    assert seal is not None
    assert seal.hex().startswith(earlier)


def test_the_order_of_secrets_is_sealed():
    """Secrets that differ only in their order have different seals, the first one included."""
    seals = {SEALER.seal(TOKEN, SECRET._replace(ordinal=number)) for number in range(20)}
    assert len(seals) == 20


def test_other_fields_are_free():
    """Names, labels, descriptions and uses do not decide, and change without a new seal."""
    token = TOKEN._replace(
        name="x", labels={"a": "b"}, description="x", last_used_time=NOW, hint="x"
    )
    assert SEALER.is_genuine(token, sealed(SECRET))


@given(st.none() | st.binary(max_size=40))
def test_no_other_seal_is_valid(seal):
    """Only the right 32 bytes are a seal."""
    right = SEALER.seal(TOKEN, SECRET)
    assert SEALER.is_genuine(TOKEN, SECRET._replace(seal=seal)) == (seal == right)


def test_a_seal_needs_the_pepper():
    """Another pepper makes another seal, and a process without the pepper trusts nothing."""
    stored = sealed(SECRET)
    assert not Sealer([OLD]).is_genuine(TOKEN, stored)
    assert Sealer([OLD]).seal(TOKEN, SECRET) is None
    assert Sealer([NEW]).is_genuine(TOKEN, stored)
    assert SEALER.seal(TOKEN, SECRET._replace(pepper_id=OLD.id)) != stored.seal
    assert SEALER.all_sealed(NEW.id) != SEALER.all_sealed(OLD.id)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rows_without_a_seal():
    """Before the proofs are known, a row without a seal is neither trusted nor refused. Then it is
    trusted exactly as long as its pepper has no proof, which a process never forgets."""
    guard = SealGuard(KEYRING, Clock())
    unsealed, old = SECRET, SECRET._replace(pepper_id=OLD.id)
    assert guard.trusts(TOKEN, sealed(SECRET))
    with pytest.raises(StoreUnavailable):
        guard.trusts(TOKEN, unsealed)
    guard.learn({NEW.id: None, OLD.id: SEALER.all_sealed(OLD.id)})
    assert guard.sealing == {NEW.id}
    assert guard.trusts(TOKEN, unsealed)
    assert not guard.trusts(TOKEN, old)
    # A proof of another pepper, or of nobody, proves nothing.
    guard.learn({NEW.id: SEALER.all_sealed(OLD.id), OLD.id: None})
    assert guard.trusts(TOKEN, unsealed)
    guard.learn({NEW.id: SEALER.all_sealed(NEW.id)})
    assert not guard.trusts(TOKEN, unsealed)
    guard.learn({})
    assert not guard.trusts(TOKEN, unsealed)
    assert guard.rejected == 3
    # Empty: the secret has ended. Never trusted, whatever the proofs say.
    assert not guard.trusts(TOKEN, SECRET._replace(seal=b""))


def token_seal(token: TokenRecord = TOKEN, pepper: Pepper = NEW) -> TokenSeal:
    return SEALER.seal_token(token, [pepper.id])


@pytest.mark.parametrize("changes", [of_token for of_token, of_secret in CHANGES if of_token])
def test_each_deciding_field_of_a_token_is_sealed(changes):
    """A token's seal is wrong for a row that differs in any field that decides."""
    assert SEALER.is_genuine_token(TOKEN, token_seal())
    assert not SEALER.is_genuine_token(TOKEN._replace(**changes), token_seal())


def test_only_the_token_s_own_seal_is_valid():
    """Neither a secret's seal, nor a proof, nor another pepper's seal is that of a token."""
    assert SEALER.is_genuine_token(TOKEN, token_seal(pepper=OLD))
    for seal in (None, b"", SEALER.seal(TOKEN, SECRET), SEALER.tokens_sealed(NEW.id)):
        assert not SEALER.is_genuine_token(TOKEN, TokenSeal(seal, NEW.id))
    assert not SEALER.is_genuine_token(TOKEN, token_seal()._replace(pepper_id=OLD.id))
    assert not SEALER.is_genuine_token(TOKEN, token_seal()._replace(pepper_id="other"))
    assert not SEALER.is_genuine_token(TOKEN, token_seal()._replace(pepper_id=None))
    assert not SEALER.proves_tokens_sealed(NEW.id, SEALER.all_sealed(NEW.id))


def test_the_first_pepper_that_is_here_seals():
    """A token is sealed with the first pepper of the list that the process has."""
    assert SEALER.seal_token(TOKEN, ["gone", OLD.id, NEW.id]).pepper_id == OLD.id
    with pytest.raises(ValueError, match="no pepper"):
        SEALER.seal_token(TOKEN, ["gone"])


def guard_with(proofs: dict[str, bytes | None] | None) -> SealGuard:
    guard = SealGuard(KEYRING, Clock())
    guard.learn({pepper.id: SEALER.all_sealed(pepper.id) for pepper in (OLD, NEW)})
    if proofs is not None:
        guard.learn_tokens(proofs)
    return guard


def test_tokens_without_a_seal():
    """A token's row without a seal is genuine if a secret's seal proves the same fields. Otherwise
    it is trusted exactly as long as no pepper has a proof, which a process never forgets."""
    none, working = TokenSeal(None, None), [sealed(SECRET)]
    with pytest.raises(StoreUnavailable):
        guard_with(None).trusts_token(TOKEN, none, [])
    assert guard_with(None).trusts_token(TOKEN, none, working)
    guard = guard_with({})
    assert guard.trusts_token(TOKEN, none, [])
    guard.learn_tokens({NEW.id: SEALER.tokens_sealed(OLD.id)})
    assert guard.trusts_token(TOKEN, none, [])
    guard.learn_tokens({NEW.id: None, OLD.id: SEALER.tokens_sealed(OLD.id)})
    guard.learn_tokens({})
    assert guard.tokens_sealed
    assert not guard.trusts_token(TOKEN, none, [])
    assert guard.rejected == 1
    assert guard.trusts_token(TOKEN, none, working)
    # The pepper of the seal was removed since.
    assert guard.trusts_token(TOKEN, TokenSeal(b"x" * 32, "gone"), working)
    assert not guard.trusts_token(TOKEN, TokenSeal(b"x" * 32, "gone"), [])


def test_a_wrong_seal_of_a_token_or_secret_is_never_trusted():
    """One wrong seal is enough, whatever the other seals and the proofs say."""
    wider = TOKEN._replace(scope=Scope.WRITE)
    for guard in (guard_with({}), guard_with({NEW.id: SEALER.tokens_sealed(NEW.id)})):
        assert guard.trusts_token(TOKEN, token_seal(), [sealed(SECRET)])
        assert guard.trusts_token(TOKEN, token_seal(), [])
        assert not guard.trusts_token(wider, token_seal(), [])
        assert not guard.trusts_token(TOKEN, token_seal(), [sealed(SECRET, wider)])
        assert not guard.trusts_token(TOKEN, token_seal(wider), [sealed(SECRET)])
        assert not guard.trusts_token(TOKEN, TokenSeal(b"", None), [sealed(SECRET)])
        assert not guard.trusts_token(TOKEN, TokenSeal(b"", "gone"), [])
        assert guard.rejected == 5
