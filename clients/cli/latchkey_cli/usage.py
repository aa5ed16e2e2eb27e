"""The command `usage`: who used a token, and when."""

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from latchkey_cli import documents, output
from latchkey_cli.options import AccountOption, JsonOption, TargetOption, TimeoutOption
from latchkey_cli.text import visible
from latchkey_cli.times import local, relative

if TYPE_CHECKING:
    # Types only: shell completion must not wait for gRPC to load.
    from latchkey import CallerUsage

__all__ = ["print_usage", "usage"]

_GAP = 2


def usage(
    token_id: Annotated[str, typer.Argument(metavar="ID", help="ID of the token.")],
    account: AccountOption,
    days: Annotated[bool, typer.Option("--days", help="Show the uses of each day too.")] = False,
    target: TargetOption = "127.0.0.1:50051",
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which callers used a token, when, and how often in the last 90 days.

    Uses are at most 15 seconds behind. Days are in UTC. With --json, the output
    is one array with an object for each caller.
    """
    from latchkey_cli.session import Doing, Session

    with Session(target, timeout) as session:
        doing = Doing(f"get the usage of token '{token_id}' of account '{account}'")
        callers = session.run(session.client.get_usage(account, token_id), doing)
    if as_json:
        output.write(sys.stdout, output.to_json(documents.document(callers)) + "\n")
    elif not callers:
        output.write(sys.stderr, f"No use of token {visible(token_id)} is recorded.\n")
    else:
        print_usage(callers, days=days)


def print_usage(callers: "tuple[CallerUsage, ...]", *, days: bool) -> None:
    """Print who used a token and, with `days`, on which days."""
    now = datetime.now(UTC)
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False)
    table.add_column("Caller", overflow="fold", header_style="bold")
    for name in ("First use", "Last use"):
        table.add_column(name, no_wrap=True, header_style="bold")
    table.add_column("Uses in 90 days", no_wrap=True, justify="right", header_style="bold")
    for caller in callers:
        table.add_row(
            Text(visible(caller.caller), "bold") if caller.caller else Text("no policy", "dim"),
            Text(local(caller.first_used_time)),
            Text(relative(caller.last_used_time, now)),
            Text(str(sum(caller.days.values()))),
        )
        for day, count in caller.days.items() if days else ():
            table.add_row("", Text(day.isoformat(), style="dim"), "", Text(str(count)))
    output.console(sys.stdout).print(table)
