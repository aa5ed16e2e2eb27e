"""The offline check of a secret's format."""

import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latchkey._shape import checksum, is_well_formed

BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
SECRETS = [  # computed independently of the code under test
    "lk" + "_" + "A" * 43 + "B" * 8 + "39kuGq",
    "lk" + "_0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abcdefghijklmno" + "0jDM4R",
    "demo" + "_" + "z" * 51 + "1KS3KR",
]
bodies = st.builds(
    "{}_{}".format,
    st.text("abcdefghijklmnopqrstuvwxyz", min_size=2, max_size=10),
    st.text(BASE62, min_size=51, max_size=51),
)


@pytest.mark.parametrize("secret", SECRETS)
def test_known_secrets_are_well_formed(secret: str) -> None:
    """The format is the contract's: CRC-32, base62 with digits first, most significant first."""
    assert is_well_formed(secret)


@given(bodies)
@settings(deadline=None)  # the machine may be busy
def test_checksum_is_the_crc_in_base_62(body: str) -> None:
    """The checksum has six digits, zero-padded, equal to the CRC-32. The secret is well-formed."""
    digits = checksum(body)
    assert len(digits) == 6
    value = 0
    for digit in digits:
        value = value * 62 + BASE62.index(digit)
    assert value == zlib.crc32(body.encode())
    assert is_well_formed(body + digits)


@given(bodies, st.integers(0, 61), st.sampled_from(BASE62))
@settings(deadline=None)  # the machine may be busy
def test_one_wrong_character_is_detected(body: str, position: int, character: str) -> None:
    """A typo in one character is detected without asking the service."""
    secret = body + checksum(body)
    position = min(position, len(secret) - 1)
    typo = secret[:position] + character + secret[position + 1 :]
    assert is_well_formed(typo) == (typo == secret)


@given(st.text())
@settings(deadline=None)  # the machine may be busy
def test_any_text_can_be_checked(text: str) -> None:
    """The check never raises, not even for lone surrogates and newlines."""
    assert not is_well_formed(text)
    assert not is_well_formed("lk" + "_" + text)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s + "\n",
        lambda s: " " + s,
        lambda s: s.upper(),
        lambda s: s.replace("_", "-"),
        lambda s: s[:-1],
        lambda s: s + "0",
        lambda s: s.replace("0", "\u0660"),  # a digit for str.isdigit(), but not in base62
        lambda s: "l" + s[2:],
        lambda s: "lklklklklkl" + s[2:],
    ],
)
def test_near_misses_are_malformed(change: "object") -> None:
    """A text that only resembles a secret is not well-formed."""
    assert callable(change)
    assert not is_well_formed(change(SECRETS[1]))


def test_a_valid_checksum_with_a_wrong_length_is_malformed() -> None:
    """A longer text is not well-formed even if its checksum matches."""
    for body in (SECRETS[1], SECRETS[1] + "\n", "l" + SECRETS[1]):
        assert not is_well_formed(body + checksum(body))
    assert not is_well_formed(SECRETS[1] + "ü" * 6)
