"""x-forwarded-client-cert: what a proxy says of the certificate that its own client showed.

Source: Envoy, "HTTP header manipulation", x-forwarded-client-cert. An element is one proxy's, its
pairs are parted by semicolons, elements by commas, and a value with any of `,;=` in it stands in
double quotes, its own quotes after a backslash.

Envoy (1.40) itself writes the client's names unquoted, whatever is in them, so that a name can look
like more pairs or elements. Hence one element alone is taken, and pairs in the order in which Envoy
writes them, where names are last; and the certificate itself is better than what is said of it.
Whether to believe the header is the listener's affair (`gate.py`).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

__all__ = ["HEADER", "Forwarded", "ForwardedError", "parse"]

HEADER: Final = "x-forwarded-client-cert"
# More than the transports let through.
LENGTH_MAX: Final = 65_536
_ORDER: Final = ("by", "hash", "cert", "chain", "subject", "uri", "dns")
_RANKS: Final = {key: rank for rank, key in enumerate(_ORDER)}
# A proxy's and a client's certificate may have several.
_SEVERAL: Final = ("by", "uri", "dns")
_PAIR: Final = re.compile(r'([A-Za-z]+)=(?:"((?:[^"\\]|\\.)*)"|([^,;="\s]*))(;|\Z)')


class ForwardedError(ValueError):
    """The header is not of this form. Carries nothing of it."""


@dataclass(frozen=True, slots=True)
class Forwarded:
    """Names of the proxy's own certificate, and of its client's."""

    by: tuple[str, ...]
    uris: tuple[str, ...]
    dns: tuple[str, ...]
    pem: bytes
    """The client's certificate, empty where the proxy does not send it."""
    certificate: bool
    """Whether there was a certificate at all: a header without one names nobody."""


def parse(header: str | bytes) -> Forwarded:
    """Return what the header's one element says. Raises ForwardedError.

    Bytes are what transports hand on where they find no text.
    """
    if isinstance(header, bytes) or len(header) > LENGTH_MAX:
        raise ForwardedError
    if not header.isascii() or not header.isprintable():
        raise ForwardedError
    pairs: list[tuple[str, str]] = []
    before = 0
    for key, value in _pairs(header):
        rank = _RANKS.get(key, -1)
        if rank < before or (rank == before and key not in _SEVERAL):
            raise ForwardedError
        before = rank
        pairs.append((key, value))
    for key in _SEVERAL:
        values = [value for other, value in pairs if other == key]
        # Envoy writes an empty one for a certificate without such names. Beside others it is a part
        # of one of them.
        if len(values) > 1 and not all(values):
            raise ForwardedError
    return Forwarded(
        by=_values(pairs, "by"),
        uris=_values(pairs, "uri"),
        dns=_values(pairs, "dns"),
        pem=unquote_to_bytes("".join(_values(pairs, "cert"))),
        certificate=any(value for key, value in pairs if key != "by"),
    )


def _pairs(header: str) -> Iterator[tuple[str, str]]:
    position = 0
    while True:
        pair = _PAIR.match(header, position)
        if pair is None:
            raise ForwardedError
        key, quoted, plain, end = pair.groups()
        yield key.lower(), plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
        if not end:
            return
        position = pair.end()


def _values(pairs: list[tuple[str, str]], wanted: str) -> tuple[str, ...]:
    return tuple(value for key, value in pairs if key == wanted and value)
