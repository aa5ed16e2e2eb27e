import shlex

import pytest
from latchkey_cli.secrets import find_secret
from latchkey_cli.text import pasted, visible

SECRET = "lk" + "_0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abcdefghijklmno" + "0jDM4R"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("deploy bot", "deploy bot"),
        ("Überwacher 監視 🔑", "Überwacher 監視 🔑"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("user\u202egnp.exe", r"user\u202egnp.exe"),
        ("\u2066a\u2069\u200b\ufeff", r"\u2066a\u2069\u200b\ufeff"),
        ("line\u2028paragraph\u2029", r"line\u2028paragraph\u2029"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_control_and_invisible_characters_are_escaped(text: str, shown: str) -> None:
    """Control, bidirectional and invisible characters are escaped; letters are unchanged."""
    assert visible(text) == shown


@pytest.mark.parametrize(
    "argument",
    [
        *(SECRET, f"--label=key={SECRET}", SECRET[:46], "acme" + SECRET[2:]),
        *(SECRET.lower(), SECRET.upper()),
        *(f"see {SECRET.lower()[:20]}{between}{SECRET.lower()[20:]} b" for between in ("\n", " ")),
    ],
)
def test_secrets_in_arguments_are_found(argument: str) -> None:
    """A secret is recognised inside an argument, with any prefix, without its end, in lower or
    upper case, and broken into two lines."""
    assert find_secret(["verify", argument]) == 2


def test_other_text_is_unchanged() -> None:
    """Names and ids may be arguments."""
    arguments = ["get", "tok_01m85p4026a9mpn8gsxx9fknb8", "lk_short", "ci_deploy_bot", "a" * 64]
    assert find_secret(arguments) is None


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("acme", "acme"),
        ("jane@example.com", "jane@example.com"),
        ("auth0|5f7c8e", '"auth0|5f7c8e"'),
        ("~root", '"~root"'),
        ("a b;$(id)", "'a b;$(id)'"),
        ("", "''"),
    ],
)
def test_words_can_be_pasted(word: str, shown: str) -> None:
    """A shell takes the shown text as this one word, with quotes only where they are needed."""
    assert pasted(word) == shown
    assert shlex.split(shown) == [word]
