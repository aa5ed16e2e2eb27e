"""Which names a person can see, and which count as the same."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latchkey_coherence.names import IGNORABLE
from latchkey_service.postgres.migrate import bundled
from latchkey_service.tokens.names import is_visible, name_key


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Deploy", "dEPLOY"),
        ("straße", "STRASSE"),
        ("Å", "A\u030a"),
        ("de\u200bploy", "deploy"),
        ("\u2060deploy\ufeff", "deploy"),
        ("de\u00adploy", "deploy"),
        ("deploy" + "".join(chr(0xE0000 + ord(c)) for c in "evil"), "deploy"),
        ("deploy\ufe0f", "deploy"),
        ("\u202edeploy", "deploy"),
        ("deploy\u3164", "deploy"),
        ("ﬁle", "file"),
        ("ｄｅｐｌｏｙ", "deploy"),
        ("𝐃eploy", "deploy"),
        ("\u2121", "tel"),
        ("my\u00a0key", "my key"),
        ("my   key", "my key"),
        ("my \u200b key", "my key"),
    ],
)
def test_the_same(one: str, other: str) -> None:
    """Case, spelling of a character, white space and characters without a mark do not count."""
    assert name_key(one) == name_key(other)


@pytest.mark.parametrize(
    ("one", "other"), [("a", "ä"), ("a", "а"), ("mykey", "my key"), ("👍", "👎")]
)
def test_different(one: str, other: str) -> None:
    """Accents, spaces, emoji and letters of other scripts count."""
    assert name_key(one) != name_key(other)


@given(st.text(max_size=64))
def test_the_key_is_stable(name: str) -> None:
    """The key of a key is the same key, and a visible name has one."""
    key = name_key(name)
    assert name_key(key) == key
    if is_visible(name):
        assert key


@pytest.mark.parametrize(
    "name", ["a", "é", "漢", "👍🏽", "👩\u200d💻", "\u200bx", ".", "e\u0301", "\u0378"]
)
def test_visible(name: str) -> None:
    """Letters, punctuation, emoji and characters that are newer than this Python are visible."""
    assert is_visible(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "\u00a0",
        "\u200b\u200d",
        "\U000e0041",
        "\u3164",
        "\u115f",
        "\u2800",
        "\u0301",
        "\ufe0f",
    ],
)
def test_invisible(name: str) -> None:
    """Spaces, zero-width and tag characters, fillers, blanks and marks alone are not visible."""
    assert not is_visible(name)


def test_the_migration_has_the_same_characters() -> None:
    """0008_names.sql removed exactly the characters from old names that are removed from new
    ones."""
    (sql,) = (migration.sql for migration in bundled() if migration.version == 8)
    quoted = re.search(r"regexp_replace\(name_key,\s*((?:'[^']*'\s*)+),", sql)
    assert quoted is not None
    pattern = "".join(re.findall(r"'([^']*)'", quoted[1]))
    assert re.compile(pattern.encode().decode("unicode_escape")).pattern == IGNORABLE.pattern
