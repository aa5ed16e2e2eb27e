"""Names of tokens: whether a person can see one, and whether two look the same. Pure.

Two names count as the same if they differ only in upper and lower case, in the spelling of the same
character (ﬁ and fi, Å and Å), in white space, or in characters that leave no mark. Letters of
different scripts that look alike (Latin a, Cyrillic а) are not compared. No maintained Python
library compares them, and a person may well use names in two scripts.
"""

import unicodedata
from typing import Final

from latchkey_coherence.names import IGNORABLE, name_key

__all__ = ["is_visible", "name_key"]

# Unassigned characters (Cn) count as visible: they may be newer than this Python.
_UNSEEN: Final = frozenset({"Cc", "Cf", "Co", "Cs", "Mc", "Me", "Mn", "Zl", "Zp", "Zs"})
# A Braille pattern without dots.
_BLANK: Final = "\u2800"


def is_visible(name: str) -> bool:
    """Return whether a name has a visible character that is not a combining mark."""
    return any(
        character != _BLANK and unicodedata.category(character) not in _UNSEEN
        for character in IGNORABLE.sub("", name)
    )
