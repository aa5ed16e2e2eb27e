"""x-forwarded-client-cert: what a proxy says of the certificate that its own client showed.

Source: Envoy, "HTTP header manipulation", x-forwarded-client-cert. Elements are parted by commas,
one for each proxy on the way, the last one's last; an element's pairs by semicolons; a value with
any of them in it stands in double quotes, its own quotes after a backslash. Whether to believe it
is the listener's affair (`gate.py`).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

__all__ = ["HEADER", "Forwarded", "ForwardedError", "parse"]

HEADER: Final = "x-forwarded-client-cert"
# More than the transports let through.
LENGTH_MAX: Final = 65_536
_KEY: Final = re.compile(r"\s*([A-Za-z]+)=")
_QUOTED: Final = re.compile(r'"((?:[^"\\]|\\.)*)"\s*')
_PLAIN: Final = re.compile(r'[^,;"]*')


class ForwardedError(ValueError):
    """The header is not of this form. Carries nothing of it."""


@dataclass(frozen=True, slots=True)
class Forwarded:
    """One element: names of the proxy's own certificate, and of its client's."""

    by: tuple[str, ...]
    uris: tuple[str, ...]
    dns: tuple[str, ...]
    certificate: bool
    """Whether there was a certificate at all: an element without one names nobody."""


def parse(header: str) -> list[Forwarded]:
    """Return the elements, in order; one at least. Raises ForwardedError."""
    if len(header) > LENGTH_MAX:
        raise ForwardedError
    elements: list[list[tuple[str, str]]] = [[]]
    for key, value, end in _pairs(header):
        elements[-1].append((key, value))
        if end == ",":
            elements.append([])
    return [
        Forwarded(
            by=_values(pairs, "by"),
            uris=_values(pairs, "uri"),
            dns=_values(pairs, "dns"),
            certificate=any(value for key, value in pairs if key != "by"),
        )
        for pairs in elements
    ]


def _pairs(header: str) -> Iterator[tuple[str, str, str]]:
    """Yield each pair with what ends it: a semicolon, a comma, or nothing."""
    position = 0
    while True:
        key = _KEY.match(header, position)
        if key is None:
            raise ForwardedError
        position = key.end()
        if header.startswith('"', position):
            value = _QUOTED.match(header, position)
            if value is None:
                raise ForwardedError
            text = re.sub(r"\\(.)", r"\1", value[1])
        else:
            value = _PLAIN.match(header, position)
            assert value is not None, "it matches nothing, too"  # noqa: S101 - for the type checker
            text = value[0].strip()
        position = value.end()
        end = header[position : position + 1]
        if end not in ("", ";", ","):
            raise ForwardedError
        yield key[1].lower(), text, end
        if not end:
            return
        position += 1


def _values(pairs: list[tuple[str, str]], wanted: str) -> tuple[str, ...]:
    return tuple(value for key, value in pairs if key == wanted and value)
