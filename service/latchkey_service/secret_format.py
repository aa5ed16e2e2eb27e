"""The secret format: mint, parse, checksum, digest. Pure; the keys are passed in.

    lk_  43 × base62            8 × base62   6 × base62
    ──── body ──────────────    tag          checksum
         256 random bits

- digest   = HMAC-SHA-256(pepper, body): the only form in which a secret is stored
- tag      = first 8 bytes of the digest, big-endian, mod 62⁸: tells a made-up secret from one that
             was minted with our pepper, without a look-up
- checksum = CRC-32 of all that comes before it: tells a typo without a key

What it does not own: where peppers are kept (`pepper_file.py`) and whether a digest belongs to a
live token (`verifier.py`).
"""

import hmac
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import NoReturn

__all__ = [
    "CREDENTIAL_PREFIX",
    "CREDENTIAL_SHAPE",
    "SECRET_LENGTH_MAX",
    "Digest",
    "Keyring",
    "Malformed",
    "Minted",
    "Pepper",
    "Secret",
    "base62",
    "checksum",
    "holds_secret",
    "without_secrets",
]

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
RANDOM_BYTES = 32
BODY_DIGITS, TAG_DIGITS, CHECKSUM_DIGITS = 43, 8, 6
TAG_MODULUS: int = 62**TAG_DIGITS
HINT_CHARACTERS = 4
# With the longest prefix, and its underscore.
SECRET_LENGTH_MAX = 11 + BODY_DIGITS + TAG_DIGITS + CHECKSUM_DIGITS

# Any prefix is read, whatever the setting: the tag covers it, and a changed setting must not
# kill live tokens. [0-9A-Za-z] and not \w, which takes in other scripts' letters.
_SHAPE = re.compile(r"[a-z]{2,10}_[0-9A-Za-z]{57}")
_is_shaped = _SHAPE.fullmatch
# Of callers' credentials (`access/credentials.py`), which have no tag.
CREDENTIAL_PREFIX = "lkc"
CREDENTIAL_SHAPE = rf"{CREDENTIAL_PREFIX}_[0-9A-Za-z]{{{BODY_DIGITS + CHECKSUM_DIGITS}}}"
# At every place, also within what looks like another: "alk_…" holds what "lk_…" does.
_SHAPES_WITHIN = [re.compile(rf"(?=({shape}))") for shape in (_SHAPE.pattern, CREDENTIAL_SHAPE)]
# What is cut out of a text, whole or not.
_SECRET_PART = re.compile(rf"([a-z]{{2,10}}_)[0-9A-Za-z]{{{BODY_DIGITS},}}")
_BODY_END = -(TAG_DIGITS + CHECKSUM_DIGITS)
# Digits are read in pairs and without a loop: a third of the time.
_PAIRS = {a + b: x * 62 + y for x, a in enumerate(ALPHABET) for y, b in enumerate(ALPHABET)}


class Secret:
    """A bearer secret that no log line, repr or format can print; `reveal()` is the one way out."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the secret itself. Called where CreateResponse is filled, and nowhere else."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(redacted)"

    __str__ = __repr__

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret does not pickle")


class Malformed(Exception):
    """The string is not a secret: wrong shape or checksum. Carries nothing of the string."""


@dataclass(frozen=True, slots=True)
class Pepper:
    """A key for digests. Its id is derived from it, so that key and id cannot be mixed up."""

    key: bytes = field(repr=False)
    id: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", sha256(b"latchkey pepper id\0" + self.key).hexdigest()[:12])


@dataclass(frozen=True, slots=True)
class Digest:
    """A secret's keyed hash, 32 bytes, with the id of the pepper that made it."""

    value: bytes = field(repr=False)
    pepper_id: str


@dataclass(frozen=True, slots=True)
class Minted:
    """A new secret with what is stored of it."""

    secret: Secret
    digest: Digest
    hint: str


class Keyring:
    """The peppers, newest first: the first mints, all of them read."""

    def __init__(self, peppers: Sequence[Pepper]) -> None:
        if not peppers:
            raise ValueError("a keyring needs at least one pepper")
        self.peppers = tuple(peppers)
        # With the key taken in: to copy one takes half the time of a new HMAC.
        self._keyed = [hmac.new(pepper.key, digestmod=sha256) for pepper in peppers]

    def mint(self, prefix: str, random_bytes: Callable[[int], bytes]) -> Minted:
        """Return a new secret. `random_bytes` is the OS's CSPRNG, passed in."""
        body = f"{prefix}_{base62(int.from_bytes(random_bytes(RANDOM_BYTES)), BODY_DIGITS)}"
        pepper = self.peppers[0]
        digest = hmac.digest(pepper.key, body.encode(), "sha256")
        tagged = body + base62(_tag(digest), TAG_DIGITS)
        text = tagged + checksum(tagged)
        hint = f"{prefix}_…{text[-HINT_CHARACTERS:]}"
        return Minted(Secret(text), Digest(digest, pepper.id), hint)

    def digest_of(self, presented: str) -> bytes | None:
        """Return the digest (32 bytes) of a presented secret, or None if its tag is wrong.

        None means that no pepper of ours minted it: UNKNOWN without a look-up.
        Raises Malformed for anything that does not have a secret's shape and checksum.
        Source: design of GitHub's token format (checksum), HMAC as of ASVS 5.0 §11.5.
        """
        if not _is_shaped(presented):
            raise Malformed
        raw = presented.encode()
        if _number(presented[-CHECKSUM_DIGITS:]) != zlib.crc32(raw[:-CHECKSUM_DIGITS]):
            raise Malformed
        body = raw[:_BODY_END]
        tag = _number(presented[_BODY_END:-CHECKSUM_DIGITS]).to_bytes(8)
        for keyed in self._keyed:
            mac = keyed.copy()
            mac.update(body)
            digest = mac.digest()
            # In constant time: the time taken must not tell how much of a guessed tag is right.
            if hmac.compare_digest(_tag(digest).to_bytes(8), tag):
                return digest
        return None


def holds_secret(text: str) -> bool:
    """Tell whether a text has a secret in it, a token's or a caller's credential, by shape and
    checksum, whatever it is stuck to."""
    return any(
        checksum(match[1][:-CHECKSUM_DIGITS]) == match[1][-CHECKSUM_DIGITS:]
        for shape in _SHAPES_WITHIN
        for match in shape.finditer(text)
    )


def without_secrets(text: str) -> str:
    """Return a text with all that looks like a secret cut down to its prefix."""
    return _SECRET_PART.sub(r"\1…", text)


def _tag(digest: bytes) -> int:
    return int.from_bytes(digest[:8]) % TAG_MODULUS


def checksum(text: str) -> str:
    """Return the checksum of what comes before it."""
    return base62(zlib.crc32(text.encode()), CHECKSUM_DIGITS)


def base62(number: int, digits: int) -> str:
    """Return `number` as exactly `digits` base62 digits, most significant first."""
    out = []
    for _ in range(digits):
        number, rest = divmod(number, 62)
        out.append(ALPHABET[rest])
    return "".join(reversed(out))


def _number(text: str) -> int:
    """Return the number that `text`, of 6 or 8 base62 digits, stands for."""
    number = (_PAIRS[text[-6:-4]] * 3844 + _PAIRS[text[-4:-2]]) * 3844 + _PAIRS[text[-2:]]
    return number if len(text) == CHECKSUM_DIGITS else number + _PAIRS[text[:2]] * 3844**3
