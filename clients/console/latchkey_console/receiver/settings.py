"""The receiver's validated settings."""

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from latchkey_console.receiver import keys
from latchkey_console.settings import SettingsError, https_or_loopback, listening_address

__all__ = ["Action", "ReceiverSettings", "make"]

LISTEN: Final = "127.0.0.1:50090"


class Action(enum.StrEnum):
    """What to do with a leaked secret."""

    REVOKE = "revoke"
    """End it. Its token stays, and is marked."""
    MARK = "mark"
    """Only mark it as leaked. It works until the owner replaces it."""


@dataclass(frozen=True, slots=True)
class ReceiverSettings:
    """All settings. There are fixed keys, or a URL, or both."""

    host: str
    port: int
    target: str
    action: Action
    keys_url: str | None
    fixed_keys: keys.Keys


def make(
    *, listen: str, target: str, action: Action, keys_url: str | None, keys_file: Path | None
) -> ReceiverSettings:
    """Return the settings. Reads the file with keys. Raises SettingsError."""
    host, port = listening_address(listen, LISTEN)
    if keys_url is None and keys_file is None:
        raise SettingsError(
            "no keys: give --keys-url, such as "
            "https://api.github.com/meta/public_keys/secret_scanning, or --keys-file"
        )
    if keys_url is not None and not https_or_loopback(keys_url):
        raise SettingsError("--keys-url: must be a URL with https, or on loopback")
    try:
        fixed = {} if keys_file is None else keys.read(keys_file)
    except keys.KeysError as error:
        raise SettingsError(f"--keys-file: cannot use {keys_file}: {error}") from None
    return ReceiverSettings(host, port, target, action, keys_url, fixed)
