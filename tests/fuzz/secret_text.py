"""Secrets as text: the service's parser, the client's check, and outputs that must not contain a
secret."""

import hmac
import random
import zlib
from collections.abc import Iterable

from latchkey import _shape
from latchkey_cli import secrets as cli_secrets
from latchkey_coherence.redaction import redact
from latchkey_service import secret_format

from tests.fuzz.target import Finding, Target

# Not the usual prefix, so that secret scanners ignore the corpus.
PREFIXES = ("fuzz", "kk", "abcdefghij", "zz")
ODD = ("\n", "\0", " ", "_", "-", "é", "٣", "\U0001d7ce", "\ud800", "a", "A", "0", "kk_", "x" * 57)
PEPPERS = [secret_format.Pepper(bytes([n]) * 32) for n in (1, 2)]


class SecretText(Target):
    """An input is text: UTF-8 and lone surrogates."""

    length_max = 400
    mutates = True

    def __init__(self) -> None:
        self._keyring = secret_format.Keyring(PEPPERS)
        # A secret is minted with either pepper, or with an unknown one.
        self._minters = [
            secret_format.Keyring([pepper])
            for pepper in (*PEPPERS, secret_format.Pepper(b"\3" * 32))
        ]

    def seeds(self) -> Iterable[bytes]:
        chance = random.Random(1)  # noqa: S311 - repeatable
        for prefix in PREFIXES:
            for text in (self._mint(prefix, chance), f"a {self._mint(prefix, chance)}, {prefix}_"):
                yield text.encode()

    def mutate(self, data: bytes, length_max: int, chance: random.Random) -> bytes:
        text = data.decode("utf-8", "replace")
        place = chance.randint(0, len(text))
        match chance.randrange(8):
            case 6:
                text = text.lower() if chance.randrange(2) else text.upper()
            case 0:
                text = self._mint(chance.choice(PREFIXES), chance)
            case 1:
                text = text[:place] + self._mint(chance.choice(PREFIXES), chance) + text[place:]
            case 2:
                text = text[:place] + chance.choice(ODD) + text[place:]
            case 3:
                text = text[:place] + text[place + chance.randint(1, 3) :]
            case 4:
                text = text[:place] + chance.choice(secret_format.ALPHABET) + text[place + 1 :]
            case 5 if len(text) > 6:
                # With a valid checksum for any preceding text.
                text = text[:-6] + secret_format.checksum(
                    text[:-6].encode("utf-8", "replace").decode()
                )
            case _:
                text = text[place:] + text[:place]
        return text.encode("utf-8", "surrogatepass")

    def one(self, data: bytes) -> None:
        text = _text(data)
        expected = _expected(text)
        try:
            digest = self._keyring.digest_of(text)
        except secret_format.Malformed as error:
            if error.args:
                raise Finding("Malformed carries data") from None
            outcome: object = secret_format.Malformed
        else:
            outcome = digest
        if outcome != expected:
            raise Finding(f"digest_of: {outcome!r}, expected {expected!r}")
        if _shape.is_well_formed(text) != (expected is not secret_format.Malformed):
            raise Finding("the client and the service disagree on whether it is well formed")
        held = _held(text)
        cased = _has_one_case(text) or _has_one_case(text.swapcase())
        if secret_format.contains_secret(text) != (bool(held) or cased):
            raise Finding(f"contains_secret: there are {held}; in one letter case: {cased}")
        redacted = redact(text)
        for secret in held:
            # The random part alone is just as sensitive, whatever the prefix. Without any prefix,
            # it cannot be recognised in a text.
            random_part = secret[-57:]
            bare = text.count(random_part) - sum(s.endswith(random_part) for s in held)
            if redacted.count(random_part) > bare:
                raise Finding("redact left a secret")
        if held and cli_secrets.find_secret(["", text]) is None:
            raise Finding("the command line would take a secret as an argument")
        _shape.placeholder(text)

    def _mint(self, prefix: str, chance: random.Random) -> str:
        return chance.choice(self._minters).mint(prefix, chance.randbytes).secret.reveal()


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _expected(text: str) -> object:
    """Return the outcome that the design specifies for a text, computed step by step."""
    if not _well_formed(text):
        return secret_format.Malformed
    tag = 0
    for character in text[-14:-6]:
        tag = tag * 62 + secret_format.ALPHABET.index(character)
    for pepper in PEPPERS:
        digest = hmac.digest(pepper.key, text[:-14].encode(), "sha256")
        if int.from_bytes(digest[:8]) % 62**8 == tag:
            return digest
    return None


def _well_formed(text: str) -> bool:
    prefix, _, rest = text.partition("_")
    if not (2 <= len(prefix) <= 10 and len(rest) == 57):
        return False
    if set(prefix) - set("abcdefghijklmnopqrstuvwxyz") or set(rest) - set(secret_format.ALPHABET):
        return False
    number = zlib.crc32(text[:-6].encode())
    return all(
        secret_format.ALPHABET[number // 62**place % 62] == digit
        for place, digit in enumerate(reversed(text[-6:]))
    )


def _held(text: str) -> list[str]:
    """Return every secret in a text, wherever it begins."""
    return [
        text[place - length : place + 58]
        for place, character in enumerate(text)
        if character == "_"
        for length in range(2, min(10, place) + 1)
        if _well_formed(text[place - length : place + 58])
    ]


TARGET = SecretText


def _has_one_case(text: str) -> bool:
    """Return whether a text has what is left of a secret or a credential in lower case, in up to
    three pieces.
    """
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    for place, character in enumerate(text):
        before = text[max(0, place - 2) : place]
        if character != "_" or len(before) < 2 or set(before) - set(digits[10:]):
            continue
        lengths = (57, 49) if text[max(0, place - 3) : place] == "lkc" else (57,)
        found, rest = "", text[place + 1 :]
        for _ in range(3):
            piece = rest[: _run(rest, digits)]
            if not piece:
                break
            found, rest = found + piece, rest[len(piece) :].lstrip()
            if len(found) in lengths and set(found) - set(digits[:16]):
                return True
    return False


def _run(text: str, characters: str) -> int:
    """Return how many of the first characters of a text are among these."""
    return next((n for n, each in enumerate(text) if each not in characters), len(text))
