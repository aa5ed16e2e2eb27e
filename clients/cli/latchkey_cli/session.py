"""One connection to the service, for commands that are plain functions.

It owns the event loop, and the translation of the client library's errors into failures. Prompts
come between the calls and not inside the loop, which would keep the first Ctrl-C to itself.
"""

import asyncio
import os
import re
from collections.abc import Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self, TypeVar

# Before grpc is loaded: its core writes lines of its own to standard error.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import latchkey

from latchkey_cli import access
from latchkey_cli.failures import Exit, Failure

__all__ = ["Doing", "Session"]

T = TypeVar("T")

_AGAIN: Final = "try again"
# What gRPC says of a call that got no connection, and so was not sent. In other words than these it
# is not known.
_UNCONNECTED: Final = re.compile(
    r"^\w+ failed: (failed to connect to all addresses|connections to all backends failing"
    r"|DNS resolution failed)"
)


@dataclass(frozen=True, slots=True)
class Doing:
    """What a call is for ("get token X"), and what to do when its answer is lost.

    `once` says that the client library never sends it again after a failure of the connection, so
    that what the error tells of the connection is all that has happened. `unconfirmed` is said when
    the change stands and verifiers have yet to confirm it.
    """

    what: str
    if_lost: str = _AGAIN
    once: bool = False
    unconfirmed: str = "it is deleted, but not every verifier has confirmed that in time"
    if_unconfirmed: str = "run this again for its receipt"


class Session:
    """A client and the loop that it lives on. Use it as a context manager, in the main thread."""

    def __init__(self, target: str, timeout_seconds: float | None) -> None:
        self._target = target
        chosen = access.chosen()
        try:
            self.client = latchkey.Client(target, access=chosen, timeout_seconds=timeout_seconds)
        except latchkey.AccessError as error:
            failure: Failure | None = access.of_no_use(str(error))
        else:
            failure = None
        if failure is not None:
            raise failure
        self._runner = asyncio.Runner()

    def run(self, call: Coroutine[Any, Any, T], doing: Doing) -> T:
        """Return what `call` returns. Raises Failure, also on Ctrl-C."""
        try:
            return self._runner.run(call)
        except latchkey.LatchkeyError as error:
            failure = _failure(error, doing, self._target)
        except KeyboardInterrupt:
            to_do = "nothing was changed" if doing.if_lost == _AGAIN else doing.if_lost
            failure = Failure(
                f"interrupted while trying to {doing.what}",
                to_do,
                Exit.INTERRUPTED,
                code="INTERRUPTED",
            )
        # Outside the handler: no traceback, should there ever be one, drags the original along.
        raise failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._runner.run(self.client.close())
        finally:
            self._runner.close()


def _failure(error: latchkey.LatchkeyError, doing: Doing, target: str) -> Failure:
    """Return `error` in the words of this tool: the library speaks of its own methods."""
    what, to_do, exit_code = _words(error, doing, target)
    violations: list[tuple[str, str]] = []
    if isinstance(error, latchkey.InvalidArgument):
        violations = [(v.field, v.description) for v in error.field_violations]
    return Failure(
        f"cannot {doing.what}: {what}",
        to_do,
        exit_code,
        code=error.code.name,
        reason=error.reason,
        request_id=error.request_id,
        field_violations=violations,
        detail=str(error),
    )


def _words(error: latchkey.LatchkeyError, doing: Doing, target: str) -> tuple[str, str, Exit]:
    match error:
        case latchkey.InvalidArgument():
            wrong = [f"{v.field}: {v.description.rstrip('. ')}" for v in error.field_violations]
            return "; ".join(wrong) or str(error), "correct it and try again", Exit.USAGE
        case latchkey.NotFound():
            to_do = "check --account and the ID; 'latchkey list -a ACCOUNT' shows what there is"
            return "the account has no such token", to_do, Exit.NOT_FOUND
        case latchkey.AlreadyExists():
            to_do = "choose another name, or delete that token first"
            return "a live token of the account has that name", to_do, Exit.ALREADY_EXISTS
        case latchkey.PermissionDenied():
            to_do = "ask whoever runs Latchkey for access, by its policy"
            return f"permission denied ({error.reason})", to_do, Exit.DENIED
        case latchkey.Unauthenticated():
            to_do = "say who you are: 'latchkey --help' has the options for access"
            return f"Latchkey does not know this caller ({error.reason})", to_do, Exit.DENIED
        case latchkey.Unavailable(reason="DELETION_NOT_CONFIRMED"):
            to_do = f"{doing.if_unconfirmed}; --timeout allows more time"
            return doing.unconfirmed, to_do, Exit.UNAVAILABLE
        case latchkey.DeadlineExceeded():
            to_do = f"{doing.if_lost}; --timeout allows more time"
            return f"{target} did not answer in time", to_do, Exit.UNAVAILABLE
        case latchkey.Unavailable() if error.reason == "TLS_HANDSHAKE_FAILED":
            to_do = "check --tls-ca, and that the name in --target is in its certificate"
            return f"{target} is not trusted, or does not speak TLS", to_do, Exit.UNAVAILABLE
        case latchkey.Unavailable() if error.reason == "CONNECTION_CLOSED":
            to_do = "check --tls-ca, --tls-certificate and --tls-key: it may want TLS, or another "
            to_do += f"client certificate{_after(doing, error)}"
            return f"{target} closes the connection", to_do, Exit.UNAVAILABLE
        case latchkey.Unavailable() if error.reason:
            # Latchkey itself said so: it is there, and something behind it is not.
            return f"{target} cannot answer now ({error.reason})", doing.if_lost, Exit.UNAVAILABLE
        case latchkey.Unavailable():
            to_do = "check --target and that Latchkey runs there ('latchkey serve')"
            to_do += _after(doing, error)
            return f"no answer from {target}", to_do, Exit.UNAVAILABLE
        case latchkey.ResourceExhausted():
            return f"{target} takes no more work now", "try again later", Exit.UNAVAILABLE
        case _:
            # Its text says it best, and ends with what to do.
            to_do = f"check that '{target}' is Latchkey, and its log"
            return str(error).rstrip(". "), to_do, Exit.UNEXPECTED


def _after(doing: Doing, error: latchkey.LatchkeyError) -> str:
    """Return what to do once there is a connection, to be put after how to come by one."""
    if doing.if_lost == _AGAIN:
        return f", then {_AGAIN}"
    if doing.once and _UNCONNECTED.search(str(error)):
        return f", then {_AGAIN}: nothing was changed"
    return f"; {doing.if_lost}"
