"""Extracts PEM blocks and reads a certificate's validity period, which `ssl` does not report.

It parses only as much DER (X.690) as that needs, and verifies nothing.
"""

import codecs
import datetime
import ssl
from typing import Final

__all__ = ["blocks", "validity"]

_PEM_BEGINS: Final = "-----BEGIN CERTIFICATE-----"
_PEM_ENDS: Final = "-----END CERTIFICATE-----"
_SEQUENCE, _VERSION, _UTC_TIME, _GENERALIZED_TIME = 0x30, 0xA0, 0x17, 0x18


def blocks(data: bytes) -> bytes:
    """Return a file's PEM blocks without the text around them, in any encoding.

    RFC 7468 §2 allows such text and gives it no meaning.
    """
    lines = []
    inside = False
    for line in data.removeprefix(codecs.BOM_UTF8).splitlines():
        inside = inside or line.startswith(b"-----BEGIN ")
        if inside:
            lines.append(line)
        inside = inside and not line.startswith(b"-----END ")
    return b"\n".join([*lines, b""])


def validity(pem: bytes) -> tuple[datetime.datetime, datetime.datetime]:
    """Return the start and end of the first certificate's validity (RFC 5280 §4.1.2.5).

    Raises ValueError if the file contains no readable certificate.
    """
    text = pem.decode("ascii", "replace")
    begin, end = text.find(_PEM_BEGINS), text.find(_PEM_ENDS)
    if not 0 <= begin < end:
        raise ValueError("no certificate found")
    der = ssl.PEM_cert_to_DER_cert(text[begin : end + len(_PEM_ENDS)])
    certificate = _content(der, 0, _SEQUENCE)
    fields = _content(certificate, 0, _SEQUENCE)
    position = 0
    if fields[:1] == bytes([_VERSION]):
        position = _next(fields, position)
    # Skip the serial number, the signature algorithm and the issuer.
    for _ in range(3):
        position = _next(fields, position)
    times = _content(fields, position, _SEQUENCE)
    return _time(times, 0), _time(times, _next(times, 0))


def _time(data: bytes, position: int) -> datetime.datetime:
    kind = data[position] if position < len(data) else -1
    form = {_UTC_TIME: "%y%m%d%H%M%SZ", _GENERALIZED_TIME: "%Y%m%d%H%M%SZ"}.get(kind)
    if form is None:
        raise ValueError("expected a time")
    start, end = _bounds(data, position)
    text = data[start:end].decode("ascii", "replace")
    # A two-digit year means 1950 to 2049 (RFC 5280 §4.1.2.5.1). Python reads it as 1969 to 2068.
    moment = datetime.datetime.strptime(text, form).replace(tzinfo=datetime.UTC)
    if kind == _UTC_TIME and moment.year >= 2050:
        moment = moment.replace(year=moment.year - 100)
    return moment


def _content(data: bytes, position: int, tag: int) -> bytes:
    if data[position : position + 1] != bytes([tag]):
        raise ValueError("unexpected DER tag")
    start, end = _bounds(data, position)
    return data[start:end]


def _next(data: bytes, position: int) -> int:
    return _bounds(data, position)[1]


def _bounds(data: bytes, position: int) -> tuple[int, int]:
    """Return the start and end of the content of the DER value at `position`."""
    if position + 2 > len(data):
        raise ValueError("truncated DER value")
    start, length = position + 2, data[position + 1]
    if length & 0x80:
        size = length & 0x7F
        length = int.from_bytes(data[start : start + size])
        start += size
    if start + length > len(data):
        raise ValueError("truncated DER value")
    return start, start + length
