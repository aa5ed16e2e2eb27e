"""The commands that change a token: `update`, `disable`, `enable`, `rotate`, `retire-secrets`."""

import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from latchkey_cli import documents, output, tables
from latchkey_cli.failures import Exit, Failure
from latchkey_cli.handover import hand_over
from latchkey_cli.options import (
    AccountOption,
    JsonOption,
    LabelOption,
    NewExpiresOption,
    NoWaitOption,
    ScopeName,
    TargetOption,
    TimeoutOption,
    YesOption,
    labels_of,
)
from latchkey_cli.restrictions import (
    BurstOption,
    DescriptionOption,
    NetworkOption,
    PermissionOption,
    RateOption,
    rate_limit_of,
)
from latchkey_cli.text import pasted
from latchkey_cli.times import parse_duration

if TYPE_CHECKING:
    # Types only: shell completion must not wait for gRPC to load.
    from latchkey import Change

    from latchkey_cli.session import Doing, Session

__all__ = ["disable", "enable", "retire_secrets", "rotate", "update"]

TARGET: Final = "127.0.0.1:50051"


def _duration(text: str) -> timedelta:
    try:
        return parse_duration(text)
    except (ValueError, OverflowError):
        raise typer.BadParameter("give a duration: 90m, 12h, 7d, or 0s for none") from None


TokenArgument = Annotated[str, typer.Argument(metavar="ID", help="ID of the token.")]


def update(
    token_id: TokenArgument,
    account: AccountOption,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", show_default=False, help="New name.")
    ] = None,
    scope: Annotated[
        ScopeName | None,
        typer.Option("--scope", case_sensitive=False, show_default=False, help="New scope."),
    ] = None,
    expires: NewExpiresOption = None,
    label: LabelOption = None,
    no_labels: Annotated[bool, typer.Option("--no-labels", help="Remove all labels.")] = False,
    description: DescriptionOption = None,
    network: NetworkOption = None,
    any_network: Annotated[
        bool, typer.Option("--any-network", help="Permit use from everywhere.")
    ] = False,
    permission: PermissionOption = None,
    no_permissions: Annotated[
        bool, typer.Option("--no-permissions", help="Remove all permissions.")
    ] = False,
    rate: RateOption = None,
    burst: BurstOption = None,
    no_rate: Annotated[bool, typer.Option("--no-rate", help="Remove the rate limit.")] = False,
    no_wait: NoWaitOption = False,
    target: TargetOption = TARGET,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change a token. Only what you name changes.

    Labels, networks and permissions are replaced as a whole: repeat the option
    for each one that the token should have afterwards.

    If the change takes something away, it is in effect everywhere when the
    command returns. With --json, the output contains the token and the receipt,
    which is null if nothing was taken away.
    """
    for values, none, options in (
        (label, no_labels, "--label and --no-labels"),
        (network, any_network, "--network and --any-network"),
        (permission, no_permissions, "--permission and --no-permissions"),
        (rate, no_rate, "--rate and --no-rate"),
    ):
        if values and none:
            raise _usage(f"{options} exclude each other", "give one of them", "update")
    changes: dict[str, Any] = {}
    if name is not None:
        changes["name"] = name
    if expires is not None:
        # The contract of an update knows no duration, so this one starts on our clock.
        changes["expire_time"] = expires.expire_time
        if expires.ttl is not None:
            changes["expire_time"] = _later(expires.ttl)
    if label or no_labels:
        changes["labels"] = labels_of(label or [])
    if description is not None:
        changes["description"] = description
    if network or any_network:
        changes["allowed_networks"] = network or []
    if permission or no_permissions:
        changes["permissions"] = permission or []
    limit = rate_limit_of(rate, burst)
    if limit is not None or no_rate:
        changes["rate_limit"] = limit
    if not changes and scope is None:
        raise _usage("nothing to change", "give at least one option, such as --name", "update")
    # Imported here: shell completion must not wait for gRPC to load.
    from latchkey import Scope

    from latchkey_cli.session import Session

    if scope is not None:
        changes["scope"] = Scope[scope.name]
    with Session(target, timeout) as session:
        call = session.client.update(account, token_id, **changes, no_wait=no_wait)
        change = session.run(call, _doing("update", token_id, account))
    _show(change, "Updated", as_json=as_json, no_wait=no_wait)


def disable(
    token_id: TokenArgument,
    account: AccountOption,
    no_wait: NoWaitOption = False,
    target: TargetOption = TARGET,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Refuse a token until you enable it again.

    When the command returns, the token is refused everywhere, with the verdict
    DISABLED. Disabling a disabled token changes nothing.
    """
    from latchkey_cli.session import Session

    with Session(target, timeout) as session:
        call = session.client.disable(account, token_id, no_wait=no_wait)
        change = session.run(call, _doing("disable", token_id, account))
    _show(change, "Disabled", as_json=as_json, no_wait=no_wait)


def enable(
    token_id: TokenArgument,
    account: AccountOption,
    target: TargetOption = TARGET,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Accept a disabled token again.

    The command returns at once. Verifiers follow within seconds.
    """
    from latchkey_cli.session import Session

    with Session(target, timeout) as session:
        call = session.client.enable(account, token_id)
        change = session.run(call, _doing("enable", token_id, account))
    _show(change, "Enabled", as_json=as_json, no_wait=False)


def rotate(
    token_id: TokenArgument,
    account: AccountOption,
    grace: Annotated[
        timedelta | None,
        typer.Option(
            "--grace",
            parser=_duration,
            metavar="DURATION",
            show_default=False,
            help="How long the older secrets still work: 90m, 12h, 7d; at most 365d.",
        ),
    ] = None,
    on_first_use: Annotated[
        bool,
        typer.Option(
            "--retire-on-first-use", help="End the older secrets when the new one is first used."
        ),
    ] = False,
    yes: YesOption = False,
    target: TargetOption = TARGET,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a token a new secret, and print it. It is never shown again.

    The older secrets work until the grace ends or, with --retire-on-first-use,
    until the new one is first used, whichever comes first. Without both, they
    are dead everywhere when the command returns, so it asks for confirmation
    unless you pass --yes.

    If standard output is not a terminal, it receives only the secret; the rest
    goes to standard error:
    latchkey rotate ID -a ACCOUNT --grace 7d > FILE

    With --json, standard output receives one object with token, secret and
    receipt.
    """
    at_once = not grace and not on_first_use
    if at_once and not yes:
        output.require_terminal("pass --yes to end the older secrets at once, or give --grace")
    from latchkey_cli.session import Doing, Session

    name = f"token '{token_id}' of account '{account}'"
    doing = Doing(
        f"rotate {name}",
        "the older secrets may be dead, and nobody knows the new one: run this again for another",
        unconfirmed="the token has a new secret that nobody received, and the older ones may work "
        "for a few more seconds",
        if_unconfirmed="run this command again for another secret",
    )
    with Session(target, timeout) as session:
        if at_once and not yes and not _confirmed(session, account, token_id, _ROTATE):
            raise typer.Exit(Exit.UNEXPECTED)
        call = session.client.rotate(
            account, token_id, grace=grace, retire_on_first_use=on_first_use
        )
        rotated = session.run(call, doing)
    again = f"'latchkey rotate {token_id} -a {pasted(account)}'"
    hand_over(
        rotated,
        as_json=as_json,
        lost="rotate the token again",
        if_not_written=f"run {again} for another one",
    )


def retire_secrets(
    token_id: TokenArgument,
    account: AccountOption,
    yes: YesOption = False,
    no_wait: NoWaitOption = False,
    target: TargetOption = TARGET,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """End all secrets of a token except the newest, before their grace ends.

    When the command returns, they are dead everywhere. It asks for confirmation
    unless you pass --yes. Without a terminal, --yes is required.
    """
    if not yes:
        output.require_terminal("pass --yes to end the older secrets")
    from latchkey_cli.session import Session

    with Session(target, timeout) as session:
        if not yes and not _confirmed(session, account, token_id, _RETIRE):
            raise typer.Exit(Exit.UNEXPECTED)
        call = session.client.retire_secrets(account, token_id, no_wait=no_wait)
        change = session.run(call, _doing("end the older secrets of", token_id, account))
    _show(change, "Ended the older secrets of", as_json=as_json, no_wait=no_wait)


_ROTATE: Final = "Give {token} a new secret, and end every older one now? [y/N] "
_RETIRE: Final = "End every secret of {token} except the newest now? [y/N] "


def _confirmed(session: "Session", account: str, token_id: str, question: str) -> bool:
    from latchkey_cli.session import Doing

    doing = Doing(f"get token '{token_id}' of account '{account}'")
    token = session.run(session.client.get(account, token_id), doing)
    return output.confirmed(question.format(token=tables.short_token(token)))


def _doing(verb: str, token_id: str, account: str) -> "Doing":
    from latchkey_cli.session import Doing

    return Doing(
        f"{verb} token '{token_id}' of account '{account}'",
        "the change may be stored but is not confirmed: run this again, which is safe",
        unconfirmed="the change is stored, but not every verifier confirmed that in time",
    )


def _show(change: "Change", done: str, *, as_json: bool, no_wait: bool) -> None:
    if as_json:
        output.write(sys.stdout, output.to_json(documents.document(change)) + "\n")
        return
    screen = output.console(sys.stdout)
    tables.print_change(screen, done, change, no_wait=no_wait)
    tables.describe_token(screen, change.token)


def _later(ttl: timedelta) -> datetime:
    try:
        return datetime.now(UTC) + ttl
    except OverflowError:
        raise typer.BadParameter("too far in the future", param_hint="--expires") from None


def _usage(what: str, to_do: str, command: str) -> Failure:
    return Failure(what, f"{to_do}; see 'latchkey {command} --help'", Exit.USAGE, code="USAGE")
