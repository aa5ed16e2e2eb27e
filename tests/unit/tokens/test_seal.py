"""Seals: each field that decides is covered, and nothing else makes a seal right. Pure."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latchkey_service.errors import StoreUnavailable
from latchkey_service.secret_format import Keyring, Pepper
from latchkey_service.tokens.seal import Sealer, SealGuard
from latchkey_service.tokens.verdict import Scope, SecretRecord, TokenRecord

OLD, NEW = Pepper(b"o" * 32), Pepper(b"n" * 32)
KEYRING = Keyring([NEW, OLD])
NOW = datetime(2026, 1, 1, tzinfo=UTC)
TOKEN = TokenRecord(
    *("tok_1", "acme", "ci", Scope.READ, NOW, NOW + timedelta(1), "lk_…abcd"),
    allowed_networks=("10.0.0.0/8", "::/0"),
    permissions=("a:b", "c:d"),
)
SECRET = SecretRecord(b"d" * 32, NEW.id, NOW, None, False, None)
SEALER = Sealer(KEYRING.peppers)
CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"id": "tok_2"}, {}),
    ({"account_id": "other"}, {}),
    ({"scope": Scope.WRITE}, {}),
    ({"expire_time": None}, {}),
    ({"expire_time": NOW + timedelta(1, microseconds=1)}, {}),
    ({"disable_time": NOW}, {}),
    ({"allowed_networks": ()}, {}),
    ({"allowed_networks": ("10.0.0.0/8",)}, {}),
    ({"permissions": ("a:b",)}, {}),
    ({"permissions": ("a:b", "c:*")}, {}),
    # The same texts in other fields, or split in other places.
    ({"allowed_networks": (), "permissions": ("10.0.0.0/8", "::/0", "a:b", "c:d")}, {}),
    ({"permissions": ('a:b", "c:d',)}, {}),
    ({}, {"digest": b"e" * 32}),
    ({}, {"expire_time": None}),
    ({}, {"expire_time": NOW + timedelta(1)}),
    ({}, {"retire_on_first_use": True}),
    ({}, {"pepper_id": OLD.id}),
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


def test_other_fields_are_free():
    """Names, labels, descriptions and uses do not decide, and change without a new seal."""
    token = TOKEN._replace(
        name="x", labels={"a": "b"}, description="x", last_used_time=NOW, hint="x"
    )
    assert SEALER.is_genuine(token, sealed(SECRET))


@given(st.none() | st.binary(max_size=40))
def test_no_other_seal_is_right(seal):
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
