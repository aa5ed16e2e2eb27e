"""Options that several commands share."""

import enum
import math
from typing import Annotated, Final

import typer

from latchkey_cli.times import Expiry, parse_expiry

__all__ = [
    "AccountOption",
    "ExpiresOption",
    "JsonOption",
    "LabelOption",
    "NewExpiresOption",
    "NoWaitOption",
    "ScopeName",
    "TargetOption",
    "TimeoutOption",
    "YesOption",
    "labels_of",
]

# Every wait needs a bound: a longer timeout is a typo, and gRPC counts in 64-bit nanoseconds.
TIMEOUT_SECONDS_MAX: Final = 3_600.0


class ScopeName(enum.StrEnum):
    """A scope as a user types it."""

    READ = "read"
    WRITE = "write"


def _expires(text: str) -> Expiry:
    try:
        return parse_expiry(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _timeout(value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and 0 < value <= TIMEOUT_SECONDS_MAX):
        raise typer.BadParameter(
            f"must be more than 0 and at most {TIMEOUT_SECONDS_MAX:.0f} seconds"
        )
    return value


def _target(value: str) -> str:
    if not value.strip():
        raise typer.BadParameter("give HOST:PORT, such as 127.0.0.1:50051, or unix:PATH")
    return value


def labels_of(pairs: list[str]) -> dict[str, str]:
    """Parse `KEY=VALUE` pairs into labels. Raises typer.BadParameter."""
    labels: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise typer.BadParameter("give KEY=VALUE", param_hint="--label")
        if key in labels:
            raise typer.BadParameter(f"{key!r} is given twice", param_hint="--label")
        labels[key] = value
    return labels


AccountOption = Annotated[
    str,
    typer.Option(
        "--account",
        "-a",
        envvar="LATCHKEY_ACCOUNT",
        metavar="ID",
        help="Account that owns the tokens.",
    ),
]
TargetOption = Annotated[
    str,
    typer.Option(
        "--target",
        envvar="LATCHKEY_TARGET",
        metavar="HOST:PORT",
        callback=_target,
        help="Address of Latchkey; unix:PATH also works.",
    ),
]
TimeoutOption = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        callback=_timeout,
        show_default=False,
        help="Time limit for one call. Default: 10 for changes, otherwise 5.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]
NoWaitOption = Annotated[
    bool,
    typer.Option("--no-wait", help="Do not wait until verifiers everywhere know the change."),
]
_EXPIRES_HELP: Final = (
    "90m, 12h, 30d, a date (its end, local time), 2030-01-31T18:00:00Z, or never."
)
ExpiresOption = Annotated[
    Expiry | None,
    typer.Option(
        "--expires", parser=_expires, metavar="WHEN", show_default="never", help=_EXPIRES_HELP
    ),
]
NewExpiresOption = Annotated[
    Expiry | None,
    typer.Option(
        "--expires", parser=_expires, metavar="WHEN", show_default=False, help=_EXPIRES_HELP
    ),
]
LabelOption = Annotated[
    list[str] | None,
    typer.Option(
        "--label", metavar="KEY=VALUE", show_default=False, help="Label; may be repeated."
    ),
]
