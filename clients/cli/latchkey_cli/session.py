"""A synchronous connection to the service, for commands that are plain functions.

This module owns the event loop and translates the client library's errors into failures. Commands
prompt between calls, outside the loop, because a running loop would swallow the first Ctrl-C.
"""

import asyncio
import re
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

import latchkey

from latchkey_cli import access, reachability
from latchkey_cli.failures import Exit, Failure

__all__ = ["Doing", "Session"]

T = TypeVar("T")

_AGAIN: Final = "try again"
# A TLS handshake with one address that accepts connections.
PROBE_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class Doing:
    """The words for one call: its purpose ("get token X") and what to do if its answer is lost.

    `changes` is False for a call that changes nothing. `unconfirmed` describes a change that is
    committed but not yet confirmed by every verifier.
    """

    what: str
    if_lost: str = _AGAIN
    changes: bool = True
    unconfirmed: str = "the token is deleted, but not every verifier confirmed that in time"
    if_unconfirmed: str = "run this command again for the receipt"


class Session:
    """A client and its event loop. Use it as a context manager, in the main thread."""

    def __init__(self, target: str, timeout_seconds: float | None) -> None:
        self._target = target
        chosen = access.chosen()
        try:
            self.client = latchkey.Client(target, access=chosen, timeout_seconds=timeout_seconds)
        except latchkey.AccessError as error:
            failure: Failure | None = access.of_no_use(str(error))
        except latchkey.InvalidArgument as error:
            what = "; ".join(v.description for v in error.field_violations)
            failure = Failure(
                f"--target: {what}", "see 'latchkey --help'", Exit.USAGE, code="USAGE"
            )
        else:
            failure = None
        if failure is not None:
            raise failure
        self._runner = asyncio.Runner()

    def run(self, call: Coroutine[Any, Any, T], doing: Doing) -> T:
        """Run `call` and return its result. Raises Failure, even on Ctrl-C."""
        try:
            return self._runner.run(call)
        except latchkey.LatchkeyError as error:
            failure = _failure(self._explained(error), doing, self._target)
        except KeyboardInterrupt:
            to_do = "nothing was changed" if doing.if_lost == _AGAIN else doing.if_lost
            failure = Failure(
                f"interrupted while trying to {doing.what}",
                to_do,
                Exit.INTERRUPTED,
                code="INTERRUPTED",
            )
        # Raised outside the handler, so that a traceback would not include the original error.
        raise failure

    def _explained(self, error: latchkey.LatchkeyError) -> latchkey.LatchkeyError:
        """Return `error`, or the error of the address that matters.

        A name such as localhost often has two addresses. gRPC reports the error of the one that it
        tried last. If nothing listens on that one, the error hides a TLS fault on the other.
        """
        if not isinstance(error, latchkey.Unavailable) or error.reason is not None:
            return error
        if "Connection refused" not in str(error):
            return error
        for address in reachability.listening(self._target):
            host, _, _ = self._target.removeprefix("dns:///").rpartition(":")
            single = latchkey.Client(
                address,
                access=access.chosen(),
                timeout_seconds=PROBE_SECONDS,
                options=[
                    ("grpc.ssl_target_name_override", host),
                    ("grpc.default_authority", self._target.removeprefix("dns:///")),
                ],
            )
            try:
                # Changes nothing, and needs no role to show whether there is a connection.
                self._runner.run(_probe(single))
            except latchkey.Unavailable as found:
                if found.reason in ("TLS_HANDSHAKE_FAILED", "CONNECTION_CLOSED"):
                    found.unsent = error.unsent
                    return found
            except latchkey.LatchkeyError:
                pass
        return error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._runner.run(self.client.close())
        finally:
            self._runner.close()


async def _probe(client: latchkey.Client) -> None:
    async with client:
        await client.verify("", None)


def _failure(error: latchkey.LatchkeyError, doing: Doing, target: str) -> Failure:
    """Translate `error` into this tool's words; the library's text names Python methods."""
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


def _words(  # noqa: PLR0911 - a table with one row for each error
    error: latchkey.LatchkeyError, doing: Doing, target: str
) -> tuple[str, str, Exit]:
    match error:
        case latchkey.InvalidArgument():
            # A violation without a field concerns the whole request.
            wrong = [
                f"{v.field}: {v.description}".removeprefix(": ").rstrip(". ")
                for v in error.field_violations
            ]
            to_do = "correct this and try again"
            if error.reason in ("EXPIRY_REQUIRED", "EXPIRY_TOO_LATE"):
                option = "--grace" if wrong[0].startswith("grace:") else "--expires"
                to_do = f"give {option}, such as {option} {_longest(error)}"
            return "; ".join(wrong) or str(error), to_do, Exit.USAGE
        case latchkey.NotFound():
            to_do = "check --account and the ID; 'latchkey list -a ACCOUNT' lists the tokens"
            return "the account has no such token", to_do, Exit.NOT_FOUND
        case latchkey.AlreadyExists():
            to_do = "choose another name, or delete that token first"
            return "a live token of the account already has that name", to_do, Exit.ALREADY_EXISTS
        case latchkey.FailedPrecondition():
            return _precondition(error)
        case latchkey.PermissionDenied() | latchkey.Unauthenticated():
            return *_denied(error), Exit.DENIED
        case latchkey.Unavailable(reason="DELETION_NOT_CONFIRMED" | "CHANGE_NOT_CONFIRMED"):
            to_do = f"{doing.if_unconfirmed}; --timeout allows more time"
            return doing.unconfirmed, to_do, Exit.UNAVAILABLE
        case latchkey.DeadlineExceeded():
            to_do = f"{doing.if_lost}; --timeout allows more time"
            return f"{target} did not answer in time", to_do, Exit.UNAVAILABLE
        case latchkey.Unavailable() if error.reason == "TLS_HANDSHAKE_FAILED":
            to_do = (
                "check --tls-ca, and that the server's certificate contains the name in --target"
            )
            return f"{target} is not trusted, or does not speak TLS", to_do, Exit.UNAVAILABLE
        case latchkey.Unavailable() if error.reason == "CONNECTION_CLOSED":
            to_do = "check --tls-ca, --tls-certificate and --tls-key: the server may require TLS "
            to_do += f"or another client certificate, or yours has expired{_after(doing, error)}"
            return f"{target} closed the connection", to_do, Exit.UNAVAILABLE
        case latchkey.Unavailable() if error.reason:
            # Latchkey itself answered, so the problem is behind it.
            return f"{target} cannot answer now ({error.reason})", doing.if_lost, Exit.UNAVAILABLE
        case latchkey.Unavailable():
            to_do = "check --target and that Latchkey runs there ('latchkey serve')"
            to_do += _after(doing, error)
            return f"no answer from {target}", to_do, Exit.UNAVAILABLE
        case latchkey.ResourceExhausted():
            return f"{target} is overloaded", "try again later", Exit.UNAVAILABLE
        case _:
            # The error's text is the best description, and it ends with advice.
            to_do = f"check that '{target}' is Latchkey, and read its log"
            return str(error).rstrip(". "), to_do, Exit.UNEXPECTED


def _longest(error: latchkey.InvalidArgument) -> str:
    """Return the longest lifetime that a refusal states, as a value of `--expires`."""
    seconds = error.metadata.get("max_ttl_seconds", "")
    if not seconds.isdigit():
        return "90d"
    units = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
    unit = next(unit for unit, length in units.items() if not int(seconds) % length)
    return f"{int(seconds) // units[unit]}{unit}"


def _denied(error: latchkey.LatchkeyError) -> tuple[str, str]:
    """Return what was denied, and what to do about it."""
    operator = "ask the Latchkey operator to"
    match error.reason:
        case "METHOD_DENIED":
            to_do = f"{operator} give this caller that role in the policy"
        case "ACCOUNT_DENIED":
            to_do = f"use an account of this caller, or {operator} add this one to the caller's "
            to_do += "'accounts' in the policy"
        case "IDENTITY_CONFLICT":
            to_do = "give only a certificate or only a credential, or those of one caller; "
            to_do += "LATCHKEY_TLS_CERTIFICATE and LATCHKEY_CREDENTIAL count too"
        case reason if isinstance(error, latchkey.PermissionDenied):
            return f"permission denied ({reason})", f"{operator} grant access in its policy"
        case reason:
            to_do = "identify yourself; 'latchkey --help' lists the access options"
            return f"Latchkey does not know this caller ({reason})", to_do
    return f"{_said(error)} ({error.reason})", to_do


def _said(error: latchkey.LatchkeyError) -> str:
    """Return the service's own words, from the library's text."""
    match = re.match(r"\w+ failed: (.*?)[. ]*\([A-Z_]+[,)]", str(error), re.DOTALL)
    words = match[1] if match is not None else "permission denied"
    return words[:1].lower() + words[1:]


def _after(doing: Doing, error: latchkey.LatchkeyError) -> str:
    """Return what to do once the connection works. The caller puts it after its own advice."""
    if doing.if_lost == _AGAIN:
        return f", then {_AGAIN}"
    if doing.changes and isinstance(error, latchkey.Unavailable) and error.unsent:
        return f", then {_AGAIN}: nothing was changed"
    return f"; {doing.if_lost}"


def _precondition(error: latchkey.LatchkeyError) -> tuple[str, str, Exit]:
    """Return the words for a call that the state of the token or of the service does not allow."""
    match error.reason:
        case "TOO_MANY_SECRETS":
            what = "the token would have more than 5 secrets that work"
            to_do = "end the older ones with 'latchkey retire-secrets ID', or give less grace"
            return what, to_do, Exit.UNEXPECTED
        case "FLEET_UPGRADING":
            what = "a server of an earlier release still runs, and would not respect the change"
            return what, "try again when all servers are upgraded", Exit.UNAVAILABLE
        case "TOKEN_SEAL_INVALID":
            what = "the token was changed in the database, without Latchkey"
            to_do = "report it to the Latchkey operator; delete the token and create another"
            return what, to_do, Exit.UNEXPECTED
        case _:
            return str(error).rstrip(". "), "ask the Latchkey operator", Exit.UNEXPECTED
