"""Reads the file with the secrets that sign events."""

import os
import re
from base64 import b64decode
from pathlib import Path
from typing import Final

from latchkey_service.settings.file_access import WEBHOOK_SECRETS, refusal

__all__ = ["WebhookError", "read_secrets"]

# As Standard Webhooks recommends: 24 to 64 bytes.
SECRET_BYTES: Final = range(24, 65)
# While the secret is being replaced, receivers accept the signature by either one.
SECRETS_MAX: Final = 4
_FILE_BYTES_MAX: Final = 4_096
_SECRET: Final = re.compile(r"whsec_[A-Za-z0-9+/]+=*")


class WebhookError(Exception):
    """The file with the webhook's secrets cannot be used. The message contains no secret."""


def read_secrets(path: Path) -> list[str]:
    """Return the secrets in a file with one per line, newest first. Raises WebhookError."""
    try:
        with path.open(encoding="ascii") as file:
            status = os.fstat(file.fileno())
            lines = file.read(_FILE_BYTES_MAX).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise WebhookError(f"cannot read the webhook's secret file {path}: {reason}") from None
    if (problem := refusal(path, status, WEBHOOK_SECRETS)) is not None:
        raise WebhookError(f"the webhook's secret file is not safe: {problem}")
    texts = [text for line in lines if (text := line.partition("#")[0].strip())]
    if not 1 <= len(texts) <= SECRETS_MAX:
        raise WebhookError(f"{path} must contain 1-{SECRETS_MAX} secrets, one per line")
    for number, text in enumerate(texts, 1):
        if _SECRET.fullmatch(text) is None or _key_length(text) not in SECRET_BYTES:
            raise WebhookError(
                f"{path}, secret {number}: must be whsec_ and the base64 of 24-64 random bytes; "
                'for example: echo "whsec_$(openssl rand -base64 32)"'
            )
    return texts


def _key_length(text: str) -> int:
    try:
        return len(b64decode(text.removeprefix("whsec_"), validate=True))
    except ValueError:
        return 0
