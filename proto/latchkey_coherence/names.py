"""The form in which names of tokens are compared. Pure.

The service refuses a second live token with the same form. Clients find a name in a list with it.
"""

import re
import unicodedata
from typing import Final

__all__ = ["IGNORABLE", "name_key"]

# Default_Ignorable_Code_Point, from DerivedCoreProperties.txt of Unicode 16. The ranges include the
# code points that Unicode reserves for further ones. Contains zero-width and tag characters,
# variation selectors, bidirectional controls and fillers. 0008_names.sql has the same list, for the
# names that were there before.
IGNORABLE: Final = re.compile(
    "[\u00ad\u034f\u061c\u115f-\u1160\u17b4-\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)


def name_key(name: str) -> str:
    """Return the form of a name that is unique among an account's live tokens.

    This is toNFKC_Casefold (Unicode §3.13.3) with white space collapsed.
    """
    # A second round, because folding can yield characters that have a simpler form.
    for _ in range(2):
        name = unicodedata.normalize("NFKC", IGNORABLE.sub("", name)).casefold()
    return " ".join(unicodedata.normalize("NFKC", name).split())
