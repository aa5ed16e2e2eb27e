"""Exit codes, and `Failure`, the exception for every expected error.

This module owns the meaning of the exit codes and the format of errors for people and scripts.
`session` translates the service's errors.
"""

import enum
from collections.abc import Iterable
from typing import Any

from latchkey_coherence.redaction import redact

from latchkey_cli.text import visible

__all__ = ["ClosedPipe", "Exit", "Failure", "worst"]


class Exit(enum.IntEnum):
    """Exit codes. Scripts depend on them, so a code never changes its meaning."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    NOT_FOUND = 3
    ALREADY_EXISTS = 4
    NOT_VALID = 5
    UNAVAILABLE = 6
    DENIED = 7
    INTERRUPTED = 130  # 128 + SIGINT
    CLOSED_PIPE = 141  # 128 + SIGPIPE


# From the least to the most severe, for a script that deletes several tokens. NOT_FOUND is certain:
# the token does not exist. After UNAVAILABLE a token may still be live, and the script must know.
_SEVERITY = (
    Exit.OK,
    Exit.NOT_FOUND,
    Exit.ALREADY_EXISTS,
    Exit.NOT_VALID,
    Exit.USAGE,
    Exit.DENIED,
    Exit.UNAVAILABLE,
    Exit.UNEXPECTED,
    Exit.CLOSED_PIPE,
    Exit.INTERRUPTED,
)


def worst(codes: Iterable[Exit]) -> Exit:
    """Return the most severe of `codes`, or OK if there are none."""
    return max(codes, key=_SEVERITY.index, default=Exit.OK)


class ClosedPipe(Exception):
    """The reader of our output closed the pipe. Not an OSError, because typer handles those."""


class Failure(Exception):
    """An expected error: `what` happened and what `to_do` about it.

    `code` is the gRPC status, USAGE, or another name in that style. `detail` is for scripts and
    logs. Anything that looks like a secret is redacted, and control characters are escaped.
    """

    def __init__(
        self,
        what: str,
        to_do: str,
        exit_code: Exit,
        *,
        code: str,
        reason: str | None = None,
        request_id: str | None = None,
        field_violations: Iterable[tuple[str, str]] = (),
        detail: str | None = None,
    ) -> None:
        self.what = _safe(what)
        self.to_do = _safe(to_do)
        self.exit_code = exit_code
        self.code = code
        self.reason = reason
        self.request_id = request_id
        self.field_violations = [(_safe(name), _safe(text)) for name, text in field_violations]
        self.detail = None if detail is None else _safe(detail)
        super().__init__(self.line())

    def line(self) -> str:
        """Return the error as one line for people."""
        request = f" (request {_safe(self.request_id)})" if self.request_id else ""
        return f"latchkey: {self.what}{request}; {self.to_do}"

    def document(self) -> dict[str, Any]:
        """Return the error for JSON output. Every key is always present."""
        return {
            "code": self.code,
            "message": self.what,
            "to_do": self.to_do,
            "exit_code": int(self.exit_code),
            "reason": self.reason,
            "request_id": self.request_id,
            "field_violations": [
                {"field": name, "description": text} for name, text in self.field_violations
            ],
            "detail": self.detail,
        }


def _safe(text: str) -> str:
    return visible(redact(text.replace("\n", " ")))
