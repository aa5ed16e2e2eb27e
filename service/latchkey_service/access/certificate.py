r"""A client certificate's alternative names, as they stand in it (RFC 5280 §4.2.1.6). Pure.

They are read from the certificate itself, since what others hand on may be another name: grpcio's
end at a NUL, so that `shop.internal\0.evil.example` would be `shop.internal`. Whether the
certificate is good, TLS has seen before, and is nothing to this module.
"""

import ssl
from collections.abc import Iterator
from typing import Final, NamedTuple

__all__ = ["CertificateError", "Names", "names_of"]

_SEQUENCE: Final = 0x30
# TBSCertificate's `extensions [3]`, and subjectAltName, 2.5.29.17.
_EXTENSIONS: Final = 0xA3
_ALTERNATIVE_NAMES: Final = b"\x55\x1d\x11"
# GeneralName's `dNSName [2]` and `uniformResourceIdentifier [6]`.
_DNS: Final = 0x82
_URI: Final = 0x86
# No certificate that a handshake lets through has a length of more bytes.
_LENGTH_BYTES_MAX: Final = 3


class CertificateError(ValueError):
    """It is no certificate, or has names that are none. Carries nothing of it."""


class Names(NamedTuple):
    """The names of a certificate that callers are known by."""

    uris: tuple[str, ...]
    dns: tuple[str, ...]


def names_of(pem: str) -> Names:
    """Return the names of a certificate. Raises CertificateError."""
    try:
        names = _alternative_names(ssl.PEM_cert_to_DER_cert(pem))
        return Names(
            *(
                tuple(_text(content) for tag, content in names if tag == wanted)
                for wanted in (_URI, _DNS)
            )
        )
    except ValueError:
        raise CertificateError from None


def _alternative_names(der: bytes) -> list[tuple[int, bytes]]:
    (_, signed), _, _ = _inside(der, _SEQUENCE)
    found = []
    for tag, block in _values(signed):
        if tag != _EXTENSIONS:
            continue
        for _, extension in _inside(block, _SEQUENCE):
            # Whether it is critical may stand between.
            (_, kind), *_, (_, value) = _values(extension)
            if kind == _ALTERNATIVE_NAMES:
                found.append(_inside(value, _SEQUENCE))
    if len(found) > 1:
        raise ValueError
    return found[0] if found else []


def _text(content: bytes) -> str:
    """Return a name. What is neither ASCII nor printable, such as a NUL, is none."""
    text = content.decode("ascii")
    if not text.isprintable():
        raise ValueError
    return text


def _inside(data: bytes, wanted: int) -> list[tuple[int, bytes]]:
    """Return what is in the one value of `data`, which has this tag."""
    ((tag, content),) = _values(data)
    if tag != wanted:
        raise ValueError
    return list(_values(content))


def _values(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield each value's tag and content (X.690 §8.1, §10.1). Raises ValueError."""
    position = 0
    while position < len(data):
        tag, *rest = data[position : position + 2 + _LENGTH_BYTES_MAX]
        # A certificate has no tags that take more than a byte.
        if not rest or tag & 0x1F == 0x1F:
            raise ValueError
        length, size = rest[0], 0
        if length & 0x80:
            size = length & 0x7F
            length = int.from_bytes(rest[1 : 1 + size])
            # In DER a length has one form, the shortest: else two might read another one each.
            if not 1 <= size <= _LENGTH_BYTES_MAX or length < 1 << max(7, 8 * (size - 1)):
                raise ValueError
        position += 2 + size
        if length > len(data) - position:
            raise ValueError
        yield tag, data[position : position + length]
        position += length
