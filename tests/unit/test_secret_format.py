"""The secret format, for any key and any randomness."""

import hmac
import pickle
import re
import zlib
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latchkey._uses import hint_of as client_hint_of
from latchkey_service.access import credentials
from latchkey_service.secret_format import (
    ALPHABET,
    Keyring,
    Malformed,
    Pepper,
    Secret,
    contains_secret,
    hint_of,
)

PEPPER = Pepper(bytes(range(32)))
KEYRING = Keyring([PEPPER])

prefixes = st.from_regex(r"[a-z]{2,10}", fullmatch=True)
entropies = st.binary(min_size=32, max_size=32)


def mint(entropy: bytes, prefix: str = "lk", keyring: Keyring = KEYRING):
    return keyring.mint(prefix, lambda size: entropy[:size])


@given(prefixes, entropies)
def test_every_new_secret_is_recognised(prefix, entropy):
    """A new secret has the published shape, and parsing it returns the stored digest."""
    minted = mint(entropy, prefix)
    text = minted.secret.reveal()
    assert re.fullmatch(rf"{prefix}_[0-9A-Za-z]{{57}}", text)
    assert len(text) == len(prefix) + 58
    assert KEYRING.digest_of(text) == minted.digest.value
    assert minted.hint == f"{prefix}_…{text[-4:]}"
    assert minted.digest.pepper_id == PEPPER.id


def test_format_never_changes():
    """A secret of an earlier release is still accepted: digits, tag and checksum never change."""
    minted = mint(bytes(range(100, 132)))
    text = minted.secret.reveal()
    number = 0
    for character in text[3:46]:
        number = number * 62 + ALPHABET.index(character)
    assert number.to_bytes(32) == bytes(range(100, 132))
    tag = int.from_bytes(minted.digest.value[:8]) % 62**8
    assert [ALPHABET.index(c) for c in text[46:54]] == [tag // 62**i % 62 for i in range(7, -1, -1)]
    checksum = zlib.crc32(text[:54].encode())
    assert [ALPHABET.index(c) for c in text[54:]] == [
        checksum // 62**i % 62 for i in range(5, -1, -1)
    ]


@given(entropies, st.integers(0, 59), st.sampled_from(ALPHABET))
def test_any_changed_character_is_malformed(entropy, place, character):
    """One wrong character at any position is detected without a key."""
    text = mint(entropy).secret.reveal()
    changed = text[:place] + character + text[place + 1 :]
    if changed == text:
        return
    with pytest.raises(Malformed):
        KEYRING.digest_of(changed)


@given(st.text(max_size=200))
def test_garbage_is_malformed(text):
    """Any text that is not a secret raises Malformed and no other exception."""
    with pytest.raises(Malformed):
        KEYRING.digest_of(text)


@pytest.mark.parametrize("odd", ["\n", "\0", " ", "é", "\U0001d7ce"])
def test_shape_is_ascii_and_whole(odd):
    """White space, a trailing newline and digits of other scripts are rejected."""
    text = mint(bytes(32)).secret.reveal()
    for changed in (text + odd, odd + text, text[:-1] + odd):
        with pytest.raises(Malformed):
            KEYRING.digest_of(changed)


@given(entropies, entropies)
def test_other_peppers_secrets_have_a_wrong_tag(entropy, key):
    """The tag identifies secrets made with other peppers, so they need no look-up."""
    foreign = mint(entropy, keyring=Keyring([Pepper(key)]))
    if key != PEPPER.key:
        assert KEYRING.digest_of(foreign.secret.reveal()) is None


@pytest.mark.parametrize("before", ["", "a", "abcdefgh", "é", "lk_", "lk_" + "A" * 55, "lk_x_"])
@pytest.mark.parametrize("after", ["", "a", "_", "\n", "lk_"])
def test_a_secret_is_found_within_a_longer_word(before, after):
    """A text contains a secret even if the prefix of the secret is part of a longer word."""
    text = mint(bytes(range(32))).secret.reveal()
    assert contains_secret(before + text + after)
    assert not contains_secret(before + text[:-1] + after)


@pytest.mark.parametrize("before", ["", "a", "lk_", "é", "lkc_"])
@pytest.mark.parametrize("after", ["", "a", "_", "\n"])
def test_a_callers_credential_is_found_too(before, after):
    """A text that contains a caller's credential counts as containing a secret."""
    text = credentials.mint(lambda size: bytes(range(size))).reveal()
    assert contains_secret(before + text + after)
    assert not contains_secret(before + text[:-1] + after)


def test_rotated_peppers_still_verify():
    """New secrets use the newest pepper; secrets of older peppers are still recognised."""
    newer = Pepper(b"n" * 32)
    rotated = Keyring([newer, PEPPER])
    old = mint(bytes(32))
    assert rotated.digest_of(old.secret.reveal()) == old.digest.value
    assert mint(bytes(32), keyring=rotated).digest.pepper_id == newer.id


def test_a_secret_cannot_be_printed():
    """repr, str, format, f-strings, containers and pickles never reveal a secret."""
    text = mint(bytes(range(32))).secret.reveal()
    secret = Secret(text)
    shown = [repr(secret), str(secret), f"{secret}", f"{secret!r:>80}".strip(), repr([secret])]
    minted = mint(bytes(range(32)))
    shown.append(repr(minted))
    assert not [s for s in shown if text in s or text[3:46] in s]
    assert minted.digest.value.hex() not in repr(minted)
    assert repr(PEPPER.key) not in repr(PEPPER)
    with pytest.raises(TypeError):
        pickle.dumps(secret)


def test_keyring_needs_a_pepper():
    """A keyring without a key is rejected, because it would store plain hashes."""
    with pytest.raises(ValueError, match="pepper"):
        Keyring([])


@given(entropies, entropies)
def test_what_a_dump_confirms(entropy, other):
    """As SECURITY.md says: with a complete secret, its row is found in a dump without the pepper.
    Without its tag, no row matches better than another one."""
    digests = [mint(each).digest.value for each in (entropy, other)]
    found = mint(entropy).secret.reveal()
    tag = sum(ALPHABET.index(c) * 62**i for i, c in enumerate(reversed(found[46:54])))
    assert int.from_bytes(digests[0][:8]) % 62**8 == tag
    guessed = Keyring([Pepper(b"guess" * 6 + b"ed")])
    assert mint(entropy, keyring=guessed).digest.value not in digests


def test_imported_digest_depends_on_pepper_and_secret():
    """The digest of an imported secret is neither its hash nor that of a Latchkey secret, and each
    pepper has another one."""
    secret = "acme_live_" + "x" * 30
    hashed = sha256(secret.encode()).digest()
    newer = Pepper(b"n" * 32)
    keyring = Keyring([newer, PEPPER], ("acme_live_",))
    digests = keyring.imported_digests_of(secret)
    assert digests == keyring.imported_digests(hashed)
    assert digests is not None
    assert len({*digests, hashed, hmac.digest(PEPPER.key, secret.encode(), "sha256")}) == 4
    assert digests[1:] == Keyring([PEPPER]).imported_digests(hashed)
    assert KEYRING.imported_digests_of(secret) is None
    assert Keyring([PEPPER], ("",)).imported_digests_of("x" * 16) is not None


@pytest.mark.parametrize(
    ("secret", "hint"),
    [
        ("lk_" + "x" * 53 + "abcd", "lk_…abcd"),
        ("acme_live_" + "x" * 30 + "abcd", "acme_…abcd"),
        # What precedes an underscore may be secret.
        ("4fD8xkQ9_Zp2mWv7YsTnLabcd", "…abcd"),
        ("4fD8xkQ9Zp2mWv7YsTnLabcd", "…abcd"),
        ("verylongprefix_" + "x" * 30 + "abcd", "…abcd"),
        ("SK_" + "x" * 30 + "abcd", "…abcd"),
    ],
)
def test_hint_shows_little(secret, hint):
    """A hint contains the last four characters, and a prefix only if it looks like a prefix of
    Latchkey. Service and client library agree, so that the uses of a secret count together."""
    assert hint_of(secret) == client_hint_of(secret) == hint
