"""Where a call comes from, as others report it: a client's address, and the person behind a caller.

Anyone can send these headers, so each counts only from whom the operator trusts: the address from
the trusted proxy, and the person from callers with `reports_people` in the policy. They are for the
audit log, and decide nothing.
"""

from collections.abc import Iterable
from ipaddress import ip_address
from typing import Final
from urllib.parse import unquote

from latchkey_service.secret_format import contains_secret

__all__ = ["ADDRESSES", "PERSON", "PERSON_LENGTH_MAX", "client_address", "person"]

# The proxy adds the address of its client at the end.
ADDRESSES: Final = "x-forwarded-for"
# Percent-encoded UTF-8, because metadata is ASCII.
PERSON: Final = "x-latchkey-person"
PERSON_LENGTH_MAX: Final = 128
_Metadata = Iterable[tuple[str, str | bytes]] | None


def client_address(metadata: _Metadata) -> str:
    """Return the address that the nearest proxy reports, or "" if it reports no address.

    Only for listeners that trust a proxy. What comes before the last element is the client's own
    claim.
    """
    last = ""
    for key, value in metadata or ():
        if key == ADDRESSES:
            last = value if isinstance(value, str) else ""
    try:
        return str(ip_address(last.rpartition(",")[2].strip()))
    except ValueError:
        return ""


def person(metadata: _Metadata) -> str:
    """Return the person that the caller reports, or "" if it reports none, several, or no text."""
    values = [value for key, value in metadata or () if key == PERSON]
    if len(values) != 1 or not isinstance(values[0], str):
        return ""
    try:
        name = unquote(values[0], errors="strict").strip()
    except UnicodeDecodeError:
        return ""
    if len(name) > PERSON_LENGTH_MAX or not name.isprintable() or contains_secret(name):
        return ""
    return name
