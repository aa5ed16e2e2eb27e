"""x-forwarded-client-cert: the client certificate that a proxy verified.

Source: Envoy, "HTTP header manipulation", x-forwarded-client-cert. Each proxy adds one element.
Commas separate elements, and semicolons separate the pairs in an element. A value that contains any
of `,;=` is in double quotes, and a backslash escapes each quote in it.

Envoy (1.40) writes the client's names unquoted, whatever they contain, so a name can look like
further pairs or elements. Therefore this parser accepts only one element, and only pairs in the
order in which Envoy writes them, where the names are last. If Envoy also sends the certificate,
Latchkey uses its names and ignores those in the header. The listener decides whether to trust the
header (`authenticator.py`).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

__all__ = ["HEADER", "Forwarded", "ForwardedError", "parse"]

HEADER: Final = "x-forwarded-client-cert"
# More than the transports accept.
LENGTH_MAX: Final = 65_536
_ORDER: Final = ("by", "hash", "cert", "chain", "subject", "uri", "dns")
_RANKS: Final = {key: rank for rank, key in enumerate(_ORDER)}
# The certificate of a proxy or client may have several of these names.
_SEVERAL: Final = ("by", "uri", "dns")
_PAIR: Final = re.compile(r'([A-Za-z]+)=(?:"((?:[^"\\]|\\.)*)"|([^,;="\s]*))(;|\Z)')


class ForwardedError(ValueError):
    """The header is malformed. The message quotes no part of it."""


@dataclass(frozen=True, slots=True)
class Forwarded:
    """The names in the proxy's own certificate (`by`) and in its client's."""

    by: tuple[str, ...]
    uris: tuple[str, ...]
    dns: tuple[str, ...]
    pem: bytes
    """The client's certificate; empty if the proxy does not send it."""
    certificate: bool
    """Whether the client presented a certificate. A header without one identifies nobody."""


def parse(header: str | bytes) -> Forwarded:
    """Parse the header's only element. Raises ForwardedError.

    The transports pass on bytes if the value is not text.
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
        # Envoy writes an empty value for a certificate without such names. An empty value beside
        # others is part of one of those names.
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
