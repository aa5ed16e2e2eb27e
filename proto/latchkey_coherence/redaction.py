"""Removes secrets from texts that people or programs will see. Pure.

Redacting too much is safer than too little. So this needs no checksum, and finds secrets anywhere
in a text: without a separator between them, in one letter case, and broken into lines.
"""

import re
from typing import Final

from latchkey_coherence.names import IGNORABLE

__all__ = ["redact"]

# The prefix and 43 random characters. The last 14 characters of a secret, a tag and a checksum, are
# not required: a copy without them still counts as leaked. A caller's credential has no tag. The
# group repeats because in two secrets without a separator, the second prefix reads like the end of
# the first secret.
_WITHIN: Final = re.compile(r"([A-Za-z]{2,10})(?:_[0-9A-Za-z]{43,})+")
# A whole secret or credential in which white space, even as `repr` shows it, or invisible
# characters follow any character.
_BREAK: Final = rf"(?:\s|\\[nrt]|{IGNORABLE.pattern.removesuffix('+')})"
_DIGIT: Final = rf"(?:[0-9A-Za-z]{_BREAK}*)"
_BROKEN: Final = re.compile(
    rf"([A-Za-z]{{2,10}})_((?<=[Ll][Kk][Cc]_){_DIGIT}{{48}}[0-9A-Za-z]|{_DIGIT}{{56}}[0-9A-Za-z])"
    r"(?![0-9A-Za-z_])"
)
# Into how many pieces a secret may be broken. A text in more pieces is ordinary words that happen
# to be as long as a secret.
_PIECES_MAX: Final = 3


def redact(text: str, replacement: str = "…(redacted)") -> str:
    """Return `text` with everything that looks like a secret reduced to its prefix.

    `replacement` stands for the rest.
    """

    def reduced(match: re.Match[str]) -> str:
        pieces = re.split(f"{_BREAK}+", match[2])
        return match[0] if len(pieces) > _PIECES_MAX else f"{match[1]}_{replacement}"

    return _BROKEN.sub(reduced, _WITHIN.sub(rf"\1_{replacement}", text))
