"""Turns the client library's errors into the page's words: what happened and what to do. Pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import latchkey

from latchkey_console.times import span

__all__ = ["Trouble", "is_refusal", "trouble"]


_Words = tuple[int, str, str]
# Why the state of a token or of the service does not allow a change.
_NOT_NOW: Final[Mapping[str | None, _Words]] = {
    "TOO_MANY_SECRETS": (
        409,
        "This token already has as many secrets as it may have",
        "End its old secrets first.",
    ),
    "FLEET_UPGRADING": (
        503,
        "The service is being upgraded",
        "Not all of its servers know this change yet. Try again in a few minutes.",
    ),
}


@dataclass(frozen=True, slots=True)
class Trouble:
    """A message for the visitor, usually an error. `status` is the response's HTTP status."""

    status: int
    title: str
    text: str
    request_id: str | None = None
    retry_seconds: int | None = None


def is_refusal(error: latchkey.LatchkeyError) -> bool:
    """Return whether `error` is a definite refusal, so that nothing was changed.

    After any other error, internal errors of the service included, the outcome is unknown.
    """
    return isinstance(
        error,
        latchkey.InvalidArgument
        | latchkey.AlreadyExists
        | latchkey.NotFound
        | latchkey.PermissionDenied
        | latchkey.Unauthenticated
        | latchkey.ResourceExhausted
        | latchkey.FailedPrecondition,
    )


def trouble(error: latchkey.LatchkeyError) -> Trouble:
    """Return the message for an error that no form field caused."""
    status, title, text = _words(error)
    wait = error.retry_after
    return Trouble(
        status,
        title,
        text,
        error.request_id,
        None if wait is None else max(1, math.ceil(wait.total_seconds())),
    )


def _words(error: latchkey.LatchkeyError) -> _Words:
    match error:
        case latchkey.DeadlineExceeded():
            return (
                504,
                "The service did not answer in time",
                "It may be very busy. Try again in a moment.",
            )
        case latchkey.Unavailable():
            return 503, "The service cannot be reached", "Try again in a moment."
        case latchkey.ResourceExhausted():
            return 503, "The service is busy", "It is overloaded right now. Try again in a moment."
        case latchkey.PermissionDenied():
            return (
                403,
                "You cannot access this account here",
                "The service denied this page's request. Ask your administrator for access.",
            )
        case latchkey.Unauthenticated():
            return (
                502,
                "This page could not authenticate to the service",
                "The service rejected the page's credentials. Ask your administrator to fix them.",
            )
        case latchkey.FailedPrecondition(reason=reason) if reason in _NOT_NOW:
            return _NOT_NOW[reason]
        case latchkey.InvalidArgument():
            return _invalid(error)
        case _:
            return (
                502,
                "The service failed unexpectedly",
                "Try again. If the error persists, contact your administrator.",
            )


def _invalid(error: latchkey.InvalidArgument) -> _Words:
    if error.reason not in ("EXPIRY_REQUIRED", "EXPIRY_TOO_LATE"):
        return 400, "Invalid request", "The service did not accept this request."
    seconds = error.metadata.get("max_ttl_seconds", "")
    if not seconds.isdigit():
        return 400, "Every token needs an expiry here", "Choose when the token expires."
    longest = span(timedelta(seconds=int(seconds)))
    text = f"Tokens may live for at most {longest} here. Choose an earlier time."
    return 400, "This is longer than allowed", text
