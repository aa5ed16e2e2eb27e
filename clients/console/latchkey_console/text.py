"""Text of other people, made harmless to read. Escaping for HTML is the templates' affair. Pure."""

import unicodedata
from typing import Final

__all__ = ["folded", "name_key", "visible"]

# Of the invisible characters, these two make emoji and letters of many languages what they are.
_JOINERS: Final = frozenset({"\u200c", "\u200d"})
# Control and format characters (the bidirectional ones make a name read as another), surrogates,
# and what has no public meaning. Tag characters are in here too: flags of regions are worth less
# than text that cannot be seen.
_SHOWN_AS_CODE: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def visible(text: str) -> str:
    """Return `text` with what a reader would not see, or be misled by, written out: ‹U+202E›."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_visible_character, text))


def folded(text: str) -> str:
    """Return what texts are compared by when someone looks for one: neither case nor form count."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def name_key(name: str) -> str:
    """Return what the service compares names by (TokenService: unique, ignoring letter case)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name.strip()).casefold())


def _visible_character(character: str) -> str:
    if character in _JOINERS or unicodedata.category(character) not in _SHOWN_AS_CODE:
        return character
    return f"‹U+{ord(character):04X}›"
