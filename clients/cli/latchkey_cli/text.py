"""Text of other people, made harmless for a terminal. Pure."""

import unicodedata
from typing import Final

__all__ = ["visible"]

# Control characters (escape sequences start with one), format characters (the bidirectional ones
# make a name read as another, the zero-width ones cannot be seen), lone surrogates, characters
# without a public meaning, and the line and paragraph separators.
_ESCAPED_CATEGORIES: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def visible(text: str) -> str:
    r"""Return `text` with what a terminal would obey or hide written out, as in "\x1b"."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_visible_character, text))


def _visible_character(character: str) -> str:
    if unicodedata.category(character) not in _ESCAPED_CATEGORIES:
        return character
    # The way of Python's own literals; surrogates have no other encoding either.
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
