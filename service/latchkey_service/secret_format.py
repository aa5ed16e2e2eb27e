"""The format of secrets: creates and parses them, and computes checksums and digests. Pure.

    lk_  43 × base62            8 × base62   6 × base62
    ──── body ──────────────    tag          checksum
         256 random bits

- digest   = HMAC-SHA-256(pepper, body): the only form in which a secret is stored
- tag      = first 8 bytes of the digest, big-endian, mod 62⁸: detects a secret that was not made
             with our pepper, without a look-up
- checksum = CRC-32 of everything before it: detects a typing error without a key

Secrets that another system made can be imported by their SHA-256 hashes. Their digest is

    HMAC-SHA-256(pepper, "latchkey imported secret", NUL, SHA-256(secret))

So the database never contains the hash itself: nobody can check a guessed secret against a dump,
and a hash that somebody writes into the database matches no secret. Such secrets have neither tag
nor checksum.

Does not own the file of the peppers (`tokens/pepper_file.py`), and does not know whether a digest
belongs to a live token (`tokens/verifier.py`). The caller passes the keys in.
"""

import hmac
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import NoReturn

__all__ = [
    "CREDENTIAL_LENGTH",
    "CREDENTIAL_PREFIX",
    "CREDENTIAL_SHAPE",
    "IMPORTED_LENGTH_MAX",
    "IMPORTED_PREFIX",
    "Digest",
    "Keyring",
    "Malformed",
    "Minted",
    "Pepper",
    "Secret",
    "base62",
    "checksum",
    "contains_secret",
    "hint_of",
]

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
RANDOM_BYTES = 32
BODY_DIGITS, TAG_DIGITS, CHECKSUM_DIGITS = 43, 8, 6
TAG_MODULUS: int = 62**TAG_DIGITS
HINT_CHARACTERS = 4

# Accepts every prefix, whatever the setting: the tag covers the prefix, and a changed setting must
# not invalidate live tokens. [0-9A-Za-z], not \w, which also matches letters of other scripts.
_SHAPE = re.compile(r"[a-z]{2,10}_[0-9A-Za-z]{57}")
_is_shaped = _SHAPE.fullmatch
# The characters of a bearer token (RFC 6750 §2.1). A shorter secret could be guessed. A longer one
# would not fit into a batch of 1,000 (`access/methods.py`).
IMPORTED_LENGTH_MIN, IMPORTED_LENGTH_MAX = 16, 128
_is_bearer = re.compile(
    rf"[0-9A-Za-z._~+/=-]{{{IMPORTED_LENGTH_MIN},{IMPORTED_LENGTH_MAX}}}"
).fullmatch
# With a longer prefix, there would be no room for the random part.
IMPORTED_PREFIX = re.compile(r"[0-9A-Za-z._~+/=-]{1,32}")
# No body of a secret contains a NUL.
_IMPORTED_USE = b"latchkey imported secret\0"
_HINT_PREFIX = re.compile(r"[a-z]{2,10}_")
# Callers' credentials (`access/credentials.py`) have no tag.
CREDENTIAL_PREFIX = "lkc"
CREDENTIAL_SHAPE = rf"{CREDENTIAL_PREFIX}_[0-9A-Za-z]{{{BODY_DIGITS + CHECKSUM_DIGITS}}}"
CREDENTIAL_LENGTH = len(CREDENTIAL_PREFIX) + 1 + BODY_DIGITS + CHECKSUM_DIGITS
# Finds overlapping matches too: "alk_…" contains "lk_…".
_SHAPES_WITHIN = [re.compile(rf"(?=({shape}))") for shape in (_SHAPE.pattern, CREDENTIAL_SHAPE)]
# A secret in one letter case, whose checksum is wrong. Almost all of it has leaked: it takes 2**36
# attempts to find the lost letter cases, and the checksum shows offline which ones are right. White
# space may break it. The prefix alone is consumed, so that matches may overlap.
_ONE_CASE = re.compile(
    r"[a-z]{2,10}_(?=((?<=lkc_)(?:[0-9a-z]\s*){48}[0-9a-z]|(?:[0-9a-z]\s*){56}[0-9a-z])"
    r"(?![0-9a-z]))"
)
# Tells a secret in one letter case from a hash in hexadecimal digits.
_BEYOND_HEX = re.compile(r"[g-z]")
# Into how many pieces a secret is broken. More of them are words that happen to have its length.
_PIECES_MAX = 3
_BODY_END = -(TAG_DIGITS + CHECKSUM_DIGITS)
# Reading digits in pairs and without a loop takes a third of the time.
_PAIRS = {a + b: x * 62 + y for x, a in enumerate(ALPHABET) for y, b in enumerate(ALPHABET)}


class Secret:
    """A bearer secret that no log line, repr or format prints. Only `reveal()` returns it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the secret itself. Call this only to fill a CreateResponse."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(redacted)"

    __str__ = __repr__

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret cannot be pickled")


class Malformed(Exception):
    """The string is not a secret: wrong shape or checksum. Contains no part of the string."""


@dataclass(frozen=True, slots=True)
class Pepper:
    """A key for digests. Its id is derived from the key, so the two cannot be mixed up."""

    key: bytes = field(repr=False)
    id: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", sha256(b"latchkey pepper id\0" + self.key).hexdigest()[:12])


@dataclass(frozen=True, slots=True)
class Digest:
    """The keyed hash of a secret, 32 bytes, with the id of its pepper."""

    value: bytes = field(repr=False)
    pepper_id: str


@dataclass(frozen=True, slots=True)
class Minted:
    """A new secret, with the digest and the hint to store."""

    secret: Secret
    digest: Digest
    hint: str


class Keyring:
    """The peppers, newest first. New secrets use the first; all of them verify.

    `imported_prefixes` are those of imported secrets; an empty one accepts any.
    """

    def __init__(self, peppers: Sequence[Pepper], imported_prefixes: Sequence[str] = ()) -> None:
        if not peppers:
            raise ValueError("a keyring needs at least one pepper")
        self.peppers = tuple(peppers)
        self.imported_prefixes = tuple(imported_prefixes)
        # HMACs that have processed their key: copying one takes half the time of a new HMAC.
        self._keyed = [hmac.new(pepper.key, digestmod=sha256) for pepper in peppers]

    def mint(self, prefix: str, random_bytes: Callable[[int], bytes]) -> Minted:
        """Return a new secret. `random_bytes` is the CSPRNG of the operating system."""
        body = f"{prefix}_{base62(int.from_bytes(random_bytes(RANDOM_BYTES)), BODY_DIGITS)}"
        pepper = self.peppers[0]
        digest = hmac.digest(pepper.key, body.encode(), "sha256")
        tagged = body + base62(_tag(digest), TAG_DIGITS)
        text = tagged + checksum(tagged)
        return Minted(Secret(text), Digest(digest, pepper.id), hint_of(text))

    def digest_of(self, presented: str) -> bytes | None:
        """Return the digest (32 bytes) of a presented secret, or None if its tag is wrong.

        None means that it was not made with any of our peppers: UNKNOWN without a look-up.
        Raises Malformed unless the string has the shape and the checksum of a secret.
        Sources: GitHub's token format (checksum); ASVS 5.0 §11.5 (HMAC).
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
            # In constant time: the duration must not reveal how much of a guessed tag is right.
            if hmac.compare_digest(_tag(digest).to_bytes(8), tag):
                return digest
        return None

    def imported_digests_of(self, presented: str) -> tuple[bytes, ...] | None:
        """Return the possible digests of a presented secret that was imported, one per pepper.

        None means that it is not one: it has no accepted prefix, or another character or length.
        """
        if not presented.startswith(self.imported_prefixes) or not _is_bearer(presented):
            return None
        return self.imported_digests(sha256(presented.encode()).digest())

    def imported_digests(self, secret_sha256: bytes) -> tuple[bytes, ...]:
        """Return the digests of an imported secret with this SHA-256 hash, newest pepper first."""
        digests = []
        for keyed in self._keyed:
            mac = keyed.copy()
            mac.update(_IMPORTED_USE + secret_sha256)
            digests.append(mac.digest())
        return tuple(digests)


def hint_of(secret: str) -> str:
    """Return the prefix and the last four characters of a secret, so that people recognise it.

    The prefix is the part before the first underscore, if it looks like a prefix of Latchkey: an
    imported secret may have none, and its first characters may be secret.
    """
    prefix = _HINT_PREFIX.match(secret)
    return f"{prefix[0] if prefix else ''}…{secret[-HINT_CHARACTERS:]}"


def contains_secret(text: str) -> bool:
    """Return whether `text` contains the secret of a token or a caller's credential.

    Recognises them by shape and checksum, whatever characters surround them. In lower or upper
    case, it recognises them by their shape alone, even if they are broken into a few lines.
    """
    return any(
        checksum(match[1][:-CHECKSUM_DIGITS]) == match[1][-CHECKSUM_DIGITS:]
        for shape in _SHAPES_WITHIN
        for match in shape.finditer(text)
    ) or any(map(_contains_one_case, (text, text.swapcase())))


def _contains_one_case(text: str) -> bool:
    return any(
        len(match[1].split()) <= _PIECES_MAX and _BEYOND_HEX.search(match[1])
        for match in _ONE_CASE.finditer(text)
    )


def _tag(digest: bytes) -> int:
    return int.from_bytes(digest[:8]) % TAG_MODULUS


def checksum(text: str) -> str:
    """Return the checksum that follows `text` in a secret."""
    return base62(zlib.crc32(text.encode()), CHECKSUM_DIGITS)


def base62(number: int, digits: int) -> str:
    """Return `number` as exactly `digits` base62 digits, most significant first."""
    out = []
    for _ in range(digits):
        number, rest = divmod(number, 62)
        out.append(ALPHABET[rest])
    return "".join(reversed(out))


def _number(text: str) -> int:
    """Return the value of `text`, a number of 6 or 8 base62 digits."""
    number = (_PAIRS[text[-6:-4]] * 3844 + _PAIRS[text[-4:-2]]) * 3844 + _PAIRS[text[-2:]]
    return number if len(text) == CHECKSUM_DIGITS else number + _PAIRS[text[:2]] * 3844**3
