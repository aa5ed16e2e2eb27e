"""Makes untrusted text safe to read. The templates escape HTML. Pure."""

import re
import unicodedata
from typing import Final

__all__ = ["name_key", "searchable", "visible", "visible_lines"]

# These two invisible characters join emoji and the letters of many scripts.
_JOINERS: Final = frozenset({"\u200c", "\u200d"})
# Control and format characters (bidirectional ones make one name look like another), surrogates,
# and private-use and unassigned characters. This includes tag characters: showing hidden text
# matters more than regional flags.
_SHOWN_AS_CODE: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})

# Rejected in names and searches.
_REJECTED: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})

# Default_Ignorable_Code_Point of Unicode 16, as in the service (tokens/names.py).
_IGNORABLE: Final = re.compile(
    "[\u00ad\u034f\u061c\u115f-\u1160\u17b4-\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)


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


def name_key(name: str) -> str:
    """Return the form of `name` that the service compares (TokenService).

    It ignores case, white space, compatible forms and characters that leave no mark.
    """
    for _ in range(2):
        name = unicodedata.normalize("NFKC", _IGNORABLE.sub("", name)).casefold()
    return " ".join(unicodedata.normalize("NFKC", name).split())


def _visible_character(character: str) -> str:
    if character in _JOINERS or unicodedata.category(character) not in _SHOWN_AS_CODE:
        return character
    return f"‹U+{ord(character):04X}›"
