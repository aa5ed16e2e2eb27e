"""Texts that contain secrets show at most the prefix of one."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latchkey_coherence.redaction import redact
from latchkey_service.access import credentials
from latchkey_service.secret_format import Keyring, Pepper

SECRETS = [
    *(
        Keyring([Pepper(bytes(32))]).mint(prefix, lambda size: bytes(range(size))).secret.reveal()
        for prefix in ("lk", "demo", "abcdefghij")
    ),
    credentials.mint(lambda size: bytes(range(size))).reveal(),
]
CASES = (str, str.lower, str.upper)


def shown(secret: str) -> str:
    return f"{secret.partition('_')[0]}_…(redacted)"


@given(st.text(), st.sampled_from(SECRETS), st.text())
@settings(deadline=None)  # the machine may be busy
def test_redaction_leaves_no_secret(before: str, secret: str, after: str) -> None:
    """The random part of a secret is redacted wherever the secret appears in a text."""
    assert secret[-40:] not in redact(before + secret + after)


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("convert", CASES)
def test_a_secret_is_redacted_in_any_letter_case(
    secret: str, convert: Callable[[str], str]
) -> None:
    """A secret is redacted in lower and upper case too, of which little is left to guess, and if
    other characters follow it."""
    text = convert(secret)
    for after in ("", "xyz"):
        assert redact(f"a {text}{after} b") == f"a {shown(text)} b"
        assert redact(f"{text!r}: {text}{after}", "…").count("_…") == 2


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("convert", CASES)
@pytest.mark.parametrize("between", ["\n", "\n    ", " ", "\\n", "\u200b", "\u00ad"])
def test_a_broken_secret_is_redacted(
    secret: str, convert: Callable[[str], str], between: str
) -> None:
    """A secret is redacted if it was broken into two or three lines, even as `repr` shows it."""
    text = convert(secret)
    for pieces in ((text[:20], text[20:]), (text[:15], text[15:40], text[40:])):
        assert redact(f"a {between.join(pieces)} b") == f"a {shown(text)} b"


@pytest.mark.parametrize("first", SECRETS)
@pytest.mark.parametrize("second", SECRETS)
def test_adjacent_secrets_are_redacted(first: str, second: str) -> None:
    """Two or three secrets without a separator are all redacted."""
    for stuck in (first + second, first + second + first):
        assert redact(f"a {stuck} b") == f"a {shown(first)} b"


@pytest.mark.parametrize(
    "text",
    [
        "tok_01m85p4026a9mpn8gsxx9fknb8 of acme was deleted by the caller shop in the evening",
        "lk_short",
        "ci_deploy_bot",
        "a" * 64,
        # As many letters as a secret, and as a credential.
        "the max_" + " ".join(["words"] * 11) + "ab, please",
        "the lkc_" + " ".join(["words"] * 9) + "abcd, please",
    ],
)
def test_other_text_is_unchanged(text: str) -> None:
    """Names, ids and sentences are left as they are."""
    assert redact(text) == text


def test_redaction_takes_linear_time() -> None:
    """Texts that almost look like secrets take no longer, because anyone may send them."""
    for text in ("lk_" + "a " * 50_000, "lk_a " * 20_000, "lk_" + ("a" + "\u200b" * 1_000) * 50):
        assert redact(text) == text
