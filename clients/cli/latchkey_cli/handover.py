"""Prints a new secret, the only time that it is shown."""

import sys
from typing import TYPE_CHECKING

from latchkey_cli import documents, output, tables
from latchkey_cli.failures import ClosedPipe, Exit, Failure
from latchkey_cli.text import visible

if TYPE_CHECKING:
    # Types only: shell completion must not wait for gRPC to load.
    from latchkey import CreatedToken, RotatedToken

__all__ = ["hand_over"]


def hand_over(
    made: "CreatedToken | RotatedToken", *, as_json: bool, lost: str, if_not_written: str
) -> None:
    """Print a token and its new secret.

    `lost` says what to do about a secret that was lost later. Raises Failure if the secret could
    not be written: then the token has a secret that nobody knows, and `if_not_written` says what to
    do about it.
    """
    try:
        _write(made, as_json=as_json, lost=lost)
    except (OSError, ClosedPipe) as error:
        reason = error.strerror if isinstance(error, OSError) else "the reader closed the pipe"
        raise Failure(
            f"token {made.token.id} has a new secret, but it could not be written: {reason}",
            if_not_written,
            Exit.UNEXPECTED,
            code="SECRET_NOT_WRITTEN",
        ) from None


def _write(made: "CreatedToken | RotatedToken", *, as_json: bool, lost: str) -> None:
    if as_json:
        output.write(sys.stdout, output.to_json(documents.with_secret(made)) + "\n")
        return
    secret = made.secret.reveal()
    if output.is_terminal(sys.stdout):
        tables.describe_token(output.console(sys.stdout), made.token)
        # No frame and no wrapping, so that people can copy it.
        output.write(sys.stdout, f"\n{visible(secret)}\n\n")
    else:
        # Written first, so that no failure in between can lose the secret.
        output.write(sys.stdout, f"{secret}\n")
        tables.describe_token(output.console(sys.stderr), made.token)
    output.write(
        sys.stderr, f"The secret is shown only once: store it now. If you lose it, {lost}.\n"
    )
