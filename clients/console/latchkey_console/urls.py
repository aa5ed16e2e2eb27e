"""URLs and hosts in settings: which are valid, and how browsers write them. Pure."""

import re
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final
from urllib.parse import SplitResult, urlsplit

__all__ = ["SettingsError", "https_or_loopback", "is_loopback", "origin", "split"]

_HOST_NAME: Final = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?")


class SettingsError(ValueError):
    """A setting is invalid. The message names it and says what to do."""


def https_or_loopback(url: str) -> bool:
    """Return whether `url` is a URL with https, or with http on loopback."""
    parts = split(url)
    if parts is None or not parts.hostname or "@" in parts.netloc:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname))


def origin(scheme: str, host: str, port: int | None) -> str:
    """Return the origin as browsers write it."""
    shown = _as_browsers_have_it(host)
    # Browsers omit the scheme's default port.
    usual = 443 if scheme == "https" else 80
    return f"{scheme}://{shown}" + ("" if port in (None, usual) else f":{port}")


def _as_browsers_have_it(host: str) -> str:
    """Return a host as browsers write it: lower case, shortest address form, name in ASCII.

    Raises SettingsError if `host` is not a valid host.
    """
    try:
        address = ip_address(host)
    except ValueError:
        pass
    else:
        return f"[{address.compressed}]" if address.version == 6 else address.compressed
    try:
        # RFC 3490. Browsers use newer IDNA rules, which give the same result for common names.
        name = host.encode("idna").decode("ascii").lower()
    except UnicodeError:
        name = ""
    if not _HOST_NAME.fullmatch(name):
        raise SettingsError(f"--public-url: {host} is not a valid host")
    return name


def split(url: str) -> SplitResult | None:
    """Return a URL's parts, or None if it is invalid, as with bad brackets or a bad port."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return parts


def is_loopback(host: str) -> bool:
    """Return whether only programs on this machine reach the host."""
    if host.lower() == "localhost":
        return True
    try:
        address: IPv4Address | IPv6Address = ip_address(host)
    except ValueError:
        return False
    return address.is_loopback
