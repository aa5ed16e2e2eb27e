"""Texts that contain a secret, which would be stored and shown as they are."""

from collections.abc import Callable

import pytest
from latchkey_service.access import credentials
from latchkey_service.secret_format import Keyring, Pepper
from latchkey_service.tokens.validation import secret_violations

SECRETS = {
    "token": Keyring([Pepper(bytes(32))]).mint("lk", lambda size: bytes(range(size))).secret,
    "credential": credentials.mint(lambda size: bytes(range(size))),
}
# As in a wrapped mail, on a page that may break a word, and in a document with soft hyphens.
BREAKS = ("", " ", "\n", "\n    ", "\u200b", "\u00ad", "\u2060")


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize("between", BREAKS)
def test_a_broken_secret_is_found(kind: str, between: str) -> None:
    """A secret is found although it was broken into two lines or has invisible characters."""
    text = SECRETS[kind].reveal()
    broken = f"see {text[:20]}{between}{text[20:]}, please"
    assert [found.field for found in secret_violations([("description", broken)])] == [
        "description"
    ]
    assert secret_violations([("description", broken.replace(text[20:], text[20:-1]))]) == []


def test_a_wide_secret_is_found() -> None:
    """A secret in full-width characters is found: it becomes the secret where it is typed again."""
    wide = "".join(chr(ord(one) + 0xFEE0) for one in SECRETS["token"].reveal())
    assert secret_violations([("name", wide)])


def test_words_around_a_secret_do_not_hide_it() -> None:
    """A secret between words is found, and words alone are not taken for one."""
    text = SECRETS["token"].reveal()
    assert secret_violations([("name", f"ab {text} cd")])
    assert secret_violations([("name", f"ab {text[:30]} {text[30:]} cd")])
    assert not secret_violations([("name", "ab lk_ " + "word " * 30)])


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize("convert", [str.lower, str.upper])
@pytest.mark.parametrize("between", BREAKS)
def test_a_secret_in_one_letter_case_is_found(
    kind: str, convert: Callable[[str], str], between: str
) -> None:
    """A secret is found in lower or upper case, although its checksum is lost: the letter cases
    are guessed offline."""
    text = convert(SECRETS[kind].reveal())
    broken = f"{text[:20]}{between}{text[20:]}"
    # Words of the same letter case must not look like a part of it.
    for words in ("", "see {} please", "see\n{}\nplease", "see {} ab cd efgh"):
        written = convert(words).format(broken) if words else broken
        assert secret_violations([("labels", written)])
    assert not secret_violations([("labels", text[:-1])])


@pytest.mark.parametrize("text", ["sha_" + "0af7" * 16, "my_" + "long" * 15, "lk_" + "A1z" * 19])
def test_other_long_words_are_accepted(text: str) -> None:
    """A hash in hexadecimal digits, a longer word, and a word in both letter cases without the
    checksum are not taken for a secret."""
    assert not secret_violations([("labels", text)])
