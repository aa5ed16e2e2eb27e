"""Settings of the page's place in a product, and of the processes that serve it together."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from latchkey_console.urls import SettingsError, https_or_loopback, origin, split

__all__ = ["Embedding", "Peer", "base_path", "frame_ancestor", "from_file", "peer"]

_BASE_PATH: Final = re.compile(r"(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+")
BASE_PATH_LENGTH_MAX: Final = 200
_ADDRESS: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Embedding:
    """The page's place in a product."""

    base_path: str = ""
    """The path below which the page is served, such as /settings/tokens. Empty: at the root."""
    header: bool = True
    """Whether the page has its own header."""
    frame_ancestors: tuple[str, ...] = ()
    """The origins whose pages may frame this page."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Another process of this console, or a name with the addresses of several."""

    host: str
    port: int


def base_path(value: str) -> str:
    """Return the base path without a trailing slash. Raises SettingsError."""
    path = value.rstrip("/")
    if path and (len(path) > BASE_PATH_LENGTH_MAX or _BASE_PATH.fullmatch(path) is None):
        raise SettingsError("--base-path: give a plain path, such as /settings/tokens")
    return path


def frame_ancestor(value: str) -> str:
    """Return the origin of `--frame-ancestor`. Raises SettingsError."""
    parts = split(value)
    mistake = SettingsError(
        f"--frame-ancestor {value}: give the origin of the page that frames this one, such as "
        "https://app.example.com"
    )
    if parts is None or not https_or_loopback(value) or parts.path not in ("", "/") or parts.query:
        raise mistake
    try:
        return origin(parts.scheme, parts.hostname or "", parts.port)
    except SettingsError:
        # Its text names --public-url.
        raise mistake from None


def peer(value: str) -> Peer:
    """Return the peer of `--peer`. Raises SettingsError."""
    match = _ADDRESS.fullmatch(value)
    if match is None or not 1 <= int(match[3]) <= 65_535:
        raise SettingsError(f"--peer {value}: give HOST:PORT, such as console-2.internal:50080")
    return Peer(match[1] or match[2], int(match[3]))


def from_file(option: str, read: Callable[[Path], T], path: Path | None) -> T | None:
    """Return what `read` makes of a file, or None without one. Raises SettingsError."""
    try:
        return None if path is None else read(path)
    except ValueError as error:
        raise SettingsError(f"{option}: {error}") from None
