"""Reads secrets from standard input or a prompt, and never from the arguments.

This module also recognises secrets where they must not appear. The service alone decides whether a
secret is valid.
"""

import getpass
import sys
from collections.abc import Iterator, Sequence
from typing import Final

from latchkey_coherence.redaction import redact

__all__ = [
    "INPUT_BYTES_MAX",
    "SecretInputError",
    "find_secret",
    "read_lines",
    "read_secret",
]

# A secret has 60 characters. Longer input is some other file, so we stop reading here.
INPUT_BYTES_MAX: Final = 64 * 1024
# An imported secret has at most 128 characters. The start of a longer line is not one either.
_LINE_BYTES_MAX: Final = 160


class SecretInputError(Exception):
    """No secret could be read. The message says why and what to do; it never quotes the input."""


def find_secret(arguments: Sequence[str]) -> int | None:
    """Return the position (from 1) of the first argument that contains a secret, or None."""
    for position, argument in enumerate(arguments, start=1):
        if redact(argument) != argument:
            return position
    return None


def read_secret() -> str:
    """Return the secret from standard input, or from a hidden prompt if that is a terminal.

    Drops one trailing newline and nothing else, so that the service judges exactly what the holder
    presented. Raises SecretInputError, and KeyboardInterrupt from the prompt.
    """
    if sys.stdin is None:
        raise SecretInputError("standard input is closed; pass the secret on it")
    if sys.stdin.isatty():
        try:
            return getpass.getpass("Secret (not shown): ", stream=sys.stderr)
        except EOFError:
            raise SecretInputError("no secret was entered; type or paste one") from None
    data = sys.stdin.buffer.read(INPUT_BYTES_MAX + 1)
    if len(data) > INPUT_BYTES_MAX:
        raise SecretInputError(
            f"standard input is longer than {INPUT_BYTES_MAX // 1024} KiB, so it is not a secret; "
            "pass only the secret"
        )
    if data.endswith(b"\n"):
        data = data[:-2] if data.endswith(b"\r\n") else data[:-1]
    # Input that is not UTF-8 is never a valid secret, and its replacement characters keep it so.
    return data.decode("utf-8", "replace")


def read_lines() -> Iterator[tuple[int, str]]:
    """Yield each secret of standard input with the number of its line, or ask for one at a prompt.

    Drops white space around a secret, and empty lines. A line that is too long to be a secret is
    cut. Raises SecretInputError, and KeyboardInterrupt from the prompt.
    """
    if sys.stdin is None or sys.stdin.isatty():
        yield 1, read_secret()
        return
    number, start = 1, True
    while line := sys.stdin.buffer.readline(_LINE_BYTES_MAX):
        if start and (text := line.strip()):
            # Input that is not UTF-8 is never a secret, and its replacement characters keep it so.
            yield number, text.decode("utf-8", "replace")
        start = line.endswith(b"\n")
        number += start
