"""Makes untrusted text safe to read. The templates escape HTML. Pure."""

import unicodedata
from typing import Final

from latchkey_coherence.names import name_key

__all__ = ["searchable", "visible", "visible_lines"]

# These two invisible characters join emoji and the letters of many scripts.
_JOINERS: Final = frozenset({"\u200c", "\u200d"})
# Control and format characters (bidirectional ones make one name look like another), surrogates,
# and private-use and unassigned characters. This includes tag characters: showing hidden text
# matters more than regional flags.
_SHOWN_AS_CODE: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})

# Rejected in names and searches.
_REJECTED: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})


def visible(text: str) -> str:
    """Replace invisible and misleading characters with their code points, as in ‹U+202E›."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_visible_character, text))


def visible_lines(text: str) -> str:
    """Write out the same characters, except for line breaks."""
    return "\n".join(map(visible, text.split("\n")))


def searchable(text: str) -> str:
    """Return `text` without characters that the service rejects in searches, or an empty text."""
    clean = "".join(c for c in text if unicodedata.category(c) not in _REJECTED)
    return clean if name_key(clean) else ""


def _visible_character(character: str) -> str:
    if character in _JOINERS or unicodedata.category(character) not in _SHOWN_AS_CODE:
        return character
    return f"‹U+{ord(character):04X}›"
