"""The hash under which the client library caches a secret."""

import hashlib

import pytest
from latchkey import _key


def test_key_is_a_hash_of_256_bits() -> None:
    """Two secrets never share a key in practice, and the key does not reveal the secret."""
    assert _key.secret_hash(b"one").digest() == hashlib.blake2s(b"one").digest()
    assert len(_key.secret_hash(b"one").digest()) == 32


@pytest.mark.parametrize("cause", ["removed", "refused"])
def test_python_restricted_to_fips_uses_sha256(monkeypatch: pytest.MonkeyPatch, cause: str) -> None:
    """The library works where Python lacks BLAKE2, or refuses it."""

    def refuse(_: bytes) -> None:
        raise ValueError("disabled for FIPS")

    if cause == "removed":
        monkeypatch.delattr(hashlib, "blake2s")
    else:
        monkeypatch.setattr(hashlib, "blake2s", refuse)
    assert _key._fastest() is hashlib.sha256
