"""How the tool ends when it does not end well: exit codes, and the one exception for it.

It owns the meaning of the exit codes and the form of an error for people and for scripts. What an
error of the service means is in `session`.
"""

import enum
from collections.abc import Iterable
from typing import Any

from latchkey_cli.secrets import redact
from latchkey_cli.text import visible

__all__ = ["ClosedPipe", "Exit", "Failure", "worst"]


class Exit(enum.IntEnum):
    """Exit codes. Scripts depend on them: a code never changes its meaning."""

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


# From the least to the most unsettling. That a token never was is certain; after UNAVAILABLE it may
# live on, which is what a script that deletes several has to learn.
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
    """Return the code that has to be told when several things were asked for; OK for none."""
    return max(codes, key=_SEVERITY.index, default=Exit.OK)


class ClosedPipe(Exception):
    """Whoever read our output stopped. Not an OSError, which typer would take for its own."""


class Failure(Exception):
    """Something foreseeable went wrong: `what` happened, and what `to_do` about it.

    `code` is the gRPC status, or USAGE, or another name in its style; `detail` is for scripts and
    logs. Whatever looks like a secret is redacted, and control characters are made visible.
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
        """Return one line for people."""
        request = f" (request {_safe(self.request_id)})" if self.request_id else ""
        return f"latchkey: {self.what}{request}; {self.to_do}"

    def document(self) -> dict[str, Any]:
        """Return what scripts get: every key is always there."""
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
