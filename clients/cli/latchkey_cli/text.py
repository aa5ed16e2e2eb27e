"""Makes untrusted text safe to print on a terminal. Pure."""

import unicodedata
from typing import Final

__all__ = ["visible"]

# Control characters (escape sequences start with one), format characters (bidirectional ones make
# one name look like another, zero-width ones are invisible), lone surrogates, private-use and
# unassigned characters, and the line and paragraph separators.
_ESCAPED_CATEGORIES: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def visible(text: str) -> str:
    r"""Escape the characters that a terminal would obey or hide, as in "\x1b"."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_visible_character, text))


def _visible_character(character: str) -> str:
    if unicodedata.category(character) not in _ESCAPED_CATEGORIES:
        return character
    # As in Python literals, which can also represent surrogates.
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
