"""Secrets on their way in: from standard input or a prompt, and never from the arguments.

It owns how a secret is recognised where it must not be. Whether one is any good is the service's
to say.
"""

import getpass
import re
import sys
from collections.abc import Sequence
from typing import Final

__all__ = ["INPUT_BYTES_MAX", "SecretInputError", "find_secret", "read_secret", "redact"]

# A secret has 60 characters. What is longer than this is some other file, not read to its end.
INPUT_BYTES_MAX: Final = 64 * 1024
# The prefix and the 43 characters of randomness. The 14 after them are a tag and a checksum: who
# sees a copy that lacks some of those has seen enough to treat the secret as leaked. One that is
# stuck to the end of another has lost its prefix to it.
_SECRET_WITHIN: Final = re.compile(r"([a-z]{2,10})(?:_[0-9A-Za-z]{43,})+")


class SecretInputError(Exception):
    """There is no secret to read. The message says why and what to do, and never what was read."""


def find_secret(arguments: Sequence[str]) -> int | None:
    """Return the position (from 1) of the first argument that holds a secret, or None."""
    for position, argument in enumerate(arguments, start=1):
        if _SECRET_WITHIN.search(argument):
            return position
    return None


def redact(text: str) -> str:
    """Return `text` with everything that looks like a secret replaced by its prefix."""
    return _SECRET_WITHIN.sub(r"\1_…(redacted)", text)


def read_secret() -> str:
    """Return the secret from standard input, or from a hidden prompt if that is a terminal.

    One trailing newline is dropped, and nothing else: what the holder presented is judged as it
    is. Raises SecretInputError, and KeyboardInterrupt from the prompt.
    """
    if sys.stdin is None:
        raise SecretInputError("standard input is closed; pass the secret there")
    if sys.stdin.isatty():
        try:
            return getpass.getpass("Secret (not shown): ", stream=sys.stderr)
        except EOFError:
            raise SecretInputError("no secret was entered; type or paste one") from None
    data = sys.stdin.buffer.read(INPUT_BYTES_MAX + 1)
    if len(data) > INPUT_BYTES_MAX:
        raise SecretInputError(
            f"standard input holds more than {INPUT_BYTES_MAX // 1024} KiB, which is no secret; "
            "pass the secret alone"
        )
    if data.endswith(b"\n"):
        data = data[:-2] if data.endswith(b"\r\n") else data[:-1]
    # What is not UTF-8 is nobody's secret; the replacement characters keep it so.
    return data.decode("utf-8", "replace")
