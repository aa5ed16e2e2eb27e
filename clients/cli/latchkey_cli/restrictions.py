"""Options that restrict tokens, and those that select tokens by a filter."""

import enum
from dataclasses import replace
from datetime import UTC, datetime, time
from typing import TYPE_CHECKING, Annotated, Final

import typer

from latchkey_cli.options import ScopeName, labels_of
from latchkey_cli.times import parse_expiry

if TYPE_CHECKING:
    # Types only: shell completion must not wait for gRPC to load.
    from latchkey import RateLimit, TokenFilter

__all__ = [
    "PAST",
    "BurstOption",
    "CanWriteOption",
    "DescriptionOption",
    "ExpiresBeforeOption",
    "FilterLabelOption",
    "FilterScopeOption",
    "LeakedOption",
    "NameContainsOption",
    "NetworkOption",
    "NeverExpiresOption",
    "NeverUsedOption",
    "PermissionOption",
    "RateOption",
    "SearchOption",
    "SecretCreatedBeforeOption",
    "StateName",
    "StateOption",
    "UnusedSinceOption",
    "YesNo",
    "past",
    "rate_limit_of",
    "token_filter",
]

PAST: Final = "30m, 12h or 7d (ago), a date, or 2030-01-31T18:00:00Z."


class StateName(enum.StrEnum):
    """A state as a user types it."""

    ACTIVE = "active"
    DISABLED = "disabled"
    EXPIRED = "expired"


class YesNo(enum.StrEnum):
    """A truth value as a user types it."""

    YES = "yes"
    NO = "no"


def past(text: str) -> datetime:
    """Parse a moment that is usually in the past. Raises typer.BadParameter."""
    return _moment(text, -1)


def _future(text: str) -> datetime:
    return _moment(text, 1)


def _moment(text: str, direction: int) -> datetime:
    """Parse a moment. A duration counts from now: 1 for later, -1 for earlier. A date means the
    first moment of that day."""
    wrong = "give a duration (30m, 12h, 7d), a date, or a time with its zone (2030-01-31T18:00:00Z)"
    try:
        said = parse_expiry(text, time())
        moment = said.expire_time
        if said.ttl is not None:
            moment = datetime.now(UTC) + direction * said.ttl
    except (ValueError, OverflowError):
        moment = None
    if moment is None:
        raise typer.BadParameter(wrong)
    return moment


DescriptionOption = Annotated[
    str | None,
    typer.Option(
        "--description", metavar="TEXT", show_default=False, help="What the token is for."
    ),
]
NetworkOption = Annotated[
    list[str] | None,
    typer.Option(
        "--network",
        metavar="CIDR",
        show_default=False,
        help="Network from which the token may be used; may be repeated.",
    ),
]
PermissionOption = Annotated[
    list[str] | None,
    typer.Option(
        "--permission",
        metavar="RESOURCE:ACTION",
        show_default=False,
        help="What the token may do, such as orders:read or orders:*; may be repeated.",
    ),
]
RateOption = Annotated[
    str | None,
    typer.Option(
        "--rate",
        metavar="N/PERIOD",
        show_default=False,
        help="How often the token may be used: 5/second, 100/minute or 1000/hour.",
    ),
]
BurstOption = Annotated[
    int | None,
    typer.Option(
        "--burst",
        metavar="N",
        show_default=False,
        help="How many uses --rate permits at once. Default: those of a whole period.",
    ),
]
FilterScopeOption = Annotated[
    ScopeName | None,
    typer.Option(
        "--scope", case_sensitive=False, show_default=False, help="Tokens with exactly this scope."
    ),
]
NameContainsOption = Annotated[
    str | None,
    typer.Option(
        "--name-contains",
        metavar="TEXT",
        show_default=False,
        help="Tokens with this text in the name.",
    ),
]
FilterLabelOption = Annotated[
    list[str] | None,
    typer.Option(
        "--label",
        metavar="KEY=VALUE",
        show_default=False,
        help="Tokens with this label; may be repeated.",
    ),
]
StateOption = Annotated[
    StateName | None,
    typer.Option(
        "--state",
        case_sensitive=False,
        metavar="STATE",
        show_default=False,
        help="Tokens that are active, disabled or expired.",
    ),
]
ExpiresBeforeOption = Annotated[
    datetime | None,
    typer.Option(
        "--expires-before",
        parser=_future,
        metavar="WHEN",
        show_default=False,
        help="Tokens that expire before: 30d (from now), a date, or a time.",
    ),
]
UnusedSinceOption = Annotated[
    datetime | None,
    typer.Option(
        "--unused-since",
        parser=past,
        metavar="WHEN",
        show_default=False,
        help="Tokens without a use since: 90d (ago), a date, or a time.",
    ),
]
CanWriteOption = Annotated[
    YesNo | None,
    typer.Option(
        "--can-write",
        case_sensitive=False,
        show_default=False,
        help="Yes: active tokens with the scope write. No: all others.",
    ),
]


SearchOption = Annotated[
    str | None,
    typer.Option(
        "--search",
        metavar="TEXT",
        show_default=False,
        help="Tokens with this text in the name or at the end of a secret.",
    ),
]
NeverUsedOption = Annotated[
    YesNo | None,
    typer.Option(
        "--never-used",
        case_sensitive=False,
        show_default=False,
        help="Yes: tokens without a recorded use. No: all others.",
    ),
]
NeverExpiresOption = Annotated[
    YesNo | None,
    typer.Option(
        "--never-expires",
        case_sensitive=False,
        show_default=False,
        help="Yes: tokens without an expiry. No: all others.",
    ),
]
SecretCreatedBeforeOption = Annotated[
    datetime | None,
    typer.Option(
        "--secret-before",
        parser=past,
        metavar="WHEN",
        show_default=False,
        help="Tokens without a newer secret than: 180d (ago), a date, or a time.",
    ),
]

LeakedOption = Annotated[
    YesNo | None,
    typer.Option(
        "--leaked",
        case_sensitive=False,
        show_default=False,
        help="Yes: tokens with a secret that was reported as leaked. No: all others.",
    ),
]


def rate_limit_of(rate: str | None, burst: int | None) -> "RateLimit | None":
    """Return the rate limit for these options, or None without one. Raises typer.BadParameter."""
    if rate is None:
        if burst is not None:
            raise typer.BadParameter("give --rate too", param_hint="--burst")
        return None
    # Imported here: shell completion must not wait for gRPC to load.
    from latchkey import RateLimit

    try:
        limit = RateLimit.parse(rate)
    except ValueError:
        limit = None
    if limit is None or limit.burst:
        raise typer.BadParameter("give a rate such as 100/minute", param_hint="--rate")
    return limit if burst is None else replace(limit, burst=burst)


def token_filter(
    scope: ScopeName | None,
    name_contains: str | None,
    label: list[str] | None,
    state: StateName | None,
    expires_before: datetime | None,
    unused_since: datetime | None,
    can_write: YesNo | None,
    search: str | None,
    never_used: YesNo | None,
    never_expires: YesNo | None,
    secret_created_before: datetime | None,
    leaked: YesNo | None,
) -> "TokenFilter":
    """Return the filter for these options. Raises typer.BadParameter."""
    labels = labels_of(label or [])
    for text, option in ((name_contains, "--name-contains"), (search, "--search")):
        if text is not None and not text.strip():
            # An unset shell variable leaves an empty text, which every name would match.
            raise typer.BadParameter("give a text", param_hint=option)
    # Imported here: shell completion must not wait for gRPC to load.
    from latchkey import Scope, TokenFilter, TokenState

    return TokenFilter(
        scope=None if scope is None else Scope[scope.name],
        name_contains=name_contains or "",
        labels=labels,
        state=None if state is None else TokenState[state.name],
        expires_before=expires_before,
        unused_since=unused_since,
        can_write=_truth(can_write),
        search=search or "",
        never_used=_truth(never_used),
        never_expires=_truth(never_expires),
        secret_created_before=secret_created_before,
        leaked=_truth(leaked),
    )


def _truth(answer: YesNo | None) -> bool | None:
    return None if answer is None else answer is YesNo.YES
