"""Names of tokens: whether a person can see one, and whether two look the same. Pure.

Two names count as the same if they differ only in upper and lower case, in the spelling of the same
character (ﬁ and fi, Å and Å), in white space, or in characters that leave no mark. Letters of
different scripts that look alike (Latin a, Cyrillic а) are not compared. There is no kept library
for that in Python, and a person may well have names in two scripts.
"""

import re
import unicodedata
from typing import Final

__all__ = ["is_visible", "name_key"]

# Default_Ignorable_Code_Point, from DerivedCoreProperties.txt of Unicode 16. The ranges include the
# code points that Unicode reserves for further ones. Contains zero-width and tag characters,
# variation selectors, bidirectional controls and fillers. 0008_names.sql has the same list, and so
# has text.py of the console.
_IGNORABLE: Final = re.compile(
    "[\u00ad\u034f\u061c\u115f-\u1160\u17b4-\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)
# Unassigned characters (Cn) count as visible: they may be newer than this Python.
_UNSEEN: Final = frozenset({"Cc", "Cf", "Co", "Cs", "Mc", "Me", "Mn", "Zl", "Zp", "Zs"})
# A Braille pattern without dots.
_BLANK: Final = "\u2800"


def name_key(name: str) -> str:
    """Return the form of a name that is unique among an account's live tokens.

    This is toNFKC_Casefold (Unicode §3.13.3) with white space collapsed.
    """
    # A second round, because folding can yield characters that have a simpler form.
    for _ in range(2):
        name = unicodedata.normalize("NFKC", _IGNORABLE.sub("", name)).casefold()
    return " ".join(unicodedata.normalize("NFKC", name).split())


def is_visible(name: str) -> bool:
    """Return whether a name has a character that leaves a mark of its own."""
    return any(
        character != _BLANK and unicodedata.category(character) not in _UNSEEN
        for character in _IGNORABLE.sub("", name)
    )
