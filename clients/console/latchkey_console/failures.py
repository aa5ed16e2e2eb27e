"""The client library's errors in the words of the page: what happened, and what to do. Pure."""

import math
from dataclasses import dataclass

import latchkey

__all__ = ["Trouble", "is_refusal", "trouble"]


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why something could not be done. `status` is for the answer, `request_id` for quoting."""

    status: int
    title: str
    text: str
    request_id: str | None = None
    retry_seconds: int | None = None


def is_refusal(error: latchkey.LatchkeyError) -> bool:
    """Tell whether `error` is Latchkey's definite no, after which nothing was changed.

    Of everything else, a fault of the service included, it is not known how far it came.
    """
    return isinstance(
        error,
        latchkey.InvalidArgument
        | latchkey.AlreadyExists
        | latchkey.NotFound
        | latchkey.PermissionDenied
        | latchkey.Unauthenticated
        | latchkey.ResourceExhausted,
    )


def trouble(error: latchkey.LatchkeyError) -> Trouble:
    """Return what to tell of an error that is nobody's mistake in a form."""
    status, title, text = _words(error)
    wait = error.retry_after
    return Trouble(
        status,
        title,
        text,
        error.request_id,
        None if wait is None else max(1, math.ceil(wait.total_seconds())),
    )


def _words(error: latchkey.LatchkeyError) -> tuple[int, str, str]:
    match error:
        case latchkey.DeadlineExceeded():
            return (
                504,
                "Latchkey did not answer in time",
                "It may be very busy. Try again in a moment.",
            )
        case latchkey.Unavailable():
            return 503, "Latchkey cannot be reached", "Try again in a moment."
        case latchkey.ResourceExhausted():
            return 503, "Latchkey is busy", "It takes no more work just now. Try again in a moment."
        case latchkey.PermissionDenied():
            return (
                403,
                "This account is not open to you here",
                "Latchkey refuses this page's request. Ask whoever runs it for access.",
            )
        case latchkey.Unauthenticated():
            return (
                502,
                "Latchkey does not know this page",
                "The page's own credentials are not accepted. Whoever runs it has to see to that.",
            )
        case latchkey.InvalidArgument():
            return 400, "Latchkey does not understand this", "It did not accept the request."
        case _:
            return (
                502,
                "Latchkey had a fault",
                "Try again; if it stays, tell whoever runs Latchkey.",
            )
