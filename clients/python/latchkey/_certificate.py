"""PEM files: their blocks, and when a certificate is valid, which `ssl` does not tell.

As much of DER (X.690) as leads to it, and no more. Nothing is verified here.
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
    """Return the PEM blocks of a file without what stands around them, in whatever encoding.

    RFC 7468 §2: such text may be there, and means nothing.
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
    """Return from when to when the first certificate of a PEM file is valid (RFC 5280 §4.1.2.5).

    Raises ValueError for what is none.
    """
    text = pem.decode("ascii", "replace")
    begin, end = text.find(_PEM_BEGINS), text.find(_PEM_ENDS)
    if not 0 <= begin < end:
        raise ValueError("there is no certificate")
    der = ssl.PEM_cert_to_DER_cert(text[begin : end + len(_PEM_ENDS)])
    certificate = _content(der, 0, _SEQUENCE)
    fields = _content(certificate, 0, _SEQUENCE)
    position = 0
    if fields[:1] == bytes([_VERSION]):
        position = _next(fields, position)
    # Past the serial number, the signature's algorithm and the issuer.
    for _ in range(3):
        position = _next(fields, position)
    times = _content(fields, position, _SEQUENCE)
    return _time(times, 0), _time(times, _next(times, 0))


def _time(data: bytes, position: int) -> datetime.datetime:
    kind = data[position] if position < len(data) else -1
    form = {_UTC_TIME: "%y%m%d%H%M%SZ", _GENERALIZED_TIME: "%Y%m%d%H%M%SZ"}.get(kind)
    if form is None:
        raise ValueError("there is no time")
    start, end = _bounds(data, position)
    text = data[start:end].decode("ascii", "replace")
    # Two digits of a year stand for 1950 to 2049 (RFC 5280 §4.1.2.5.1); Python takes them for
    # 1969 to 2068.
    moment = datetime.datetime.strptime(text, form).replace(tzinfo=datetime.UTC)
    if kind == _UTC_TIME and moment.year >= 2050:
        moment = moment.replace(year=moment.year - 100)
    return moment


def _content(data: bytes, position: int, tag: int) -> bytes:
    if data[position : position + 1] != bytes([tag]):
        raise ValueError("something else is there")
    start, end = _bounds(data, position)
    return data[start:end]


def _next(data: bytes, position: int) -> int:
    return _bounds(data, position)[1]


def _bounds(data: bytes, position: int) -> tuple[int, int]:
    """Return where the content of the value at a position begins and ends."""
    if position + 2 > len(data):
        raise ValueError("it is cut off")
    start, length = position + 2, data[position + 1]
    if length & 0x80:
        size = length & 0x7F
        length = int.from_bytes(data[start : start + size])
        start += size
    if start + length > len(data):
        raise ValueError("it is cut off")
    return start, start + length
