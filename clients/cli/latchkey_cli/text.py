"""Makes untrusted text safe to print on a terminal, and to paste into a shell. Pure."""

import re
import shlex
import unicodedata
from typing import Final

__all__ = ["pasted", "visible"]

# Control characters (escape sequences start with one), format characters (bidirectional ones make
# one name look like another, zero-width ones are invisible), lone surrogates, private-use and
# unassigned characters, and the line and paragraph separators.
_ESCAPED_CATEGORIES: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


# No shell gives a meaning to these, wherever they stand.
_PLAIN: Final = re.compile(r"[A-Za-z0-9._:@+/-]+")
# Account ids may contain these too, and double quotes are enough for them.
_IN_QUOTES: Final = re.compile(r"[A-Za-z0-9._:@|+=/~-]+")


def pasted(word: str) -> str:
    """Return a word as people can paste it into a shell.

    Our messages put commands into single quotes, so this prefers double quotes.
    """
    if _PLAIN.fullmatch(word):
        return word
    return f'"{word}"' if _IN_QUOTES.fullmatch(word) else shlex.quote(word)


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
