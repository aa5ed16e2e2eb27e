"""The command `find`: tokens of all accounts, for operators."""

import re
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.table import Table
from rich.text import Text

from latchkey_cli import documents, output, tables, usage
from latchkey_cli.failures import Exit, Failure
from latchkey_cli.options import JsonOption, TargetOption, TimeoutOption
from latchkey_cli.text import visible
from latchkey_cli.times import local, relative

if TYPE_CHECKING:
    # Types only: shell completion must not wait for gRPC to load.
    from latchkey import FoundPage, FoundToken

__all__ = ["find"]

LIMIT: Final = 50
# The service's maximum, for the fewest round trips.
PAGE_SIZE: Final = 100
# A whole id, or a part of one that was copied. Hints differ from it: they contain an ellipsis.
_ID: Final = re.compile(r"tok_[0-9A-Za-z]+")
_GAP: Final = 2


def find(
    wanted: Annotated[
        str,
        typer.Argument(
            metavar="ID|HINT",
            help="ID of a token, or the last four characters of a secret.",
            show_default=False,
        ),
    ],
    limit: Annotated[
        int, typer.Option("--limit", min=0, metavar="N", help="At most N tokens; 0 means all.")
    ] = LIMIT,
    target: TargetOption = "127.0.0.1:50051",
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find tokens in all accounts, for operators.

    A hint is what 'latchkey list' shows of a secret, such as lk_…3kF9. Its last
    four characters are enough, in any letter case. Deleted tokens are included
    until their records are purged.

    With --json, the output is one object with the tokens and, for an ID, the
    callers that used it. The exit code is 3 if there is no such token.
    """
    from latchkey_cli.session import Doing, Session

    found: list[FoundToken] = []
    page: FoundPage | None = None
    position = ""
    by_id = _ID.fullmatch(wanted) is not None
    with Session(target, timeout) as session:
        while page is None or (position and (not limit or len(found) < limit)):
            size = min(limit - len(found), PAGE_SIZE) if limit else PAGE_SIZE
            page = session.run(
                session.client.find(
                    token_id=wanted if by_id else "",
                    hint="" if by_id else wanted,
                    page_size=size,
                    page_token=position,
                ),
                Doing("find tokens"),
            )
            found += page.tokens
            position = page.next_page_token
    if as_json:
        shown = {
            "tokens": documents.document(tuple(found)),
            "callers": documents.document(page.callers),
        }
        output.write(sys.stdout, output.to_json(shown) + "\n")
        if not found:
            raise typer.Exit(Exit.NOT_FOUND)
        return
    if not found:
        raise Failure(
            f"no token has this {'ID' if by_id else 'hint'}",
            "the records of deleted tokens are purged after some time",
            Exit.NOT_FOUND,
            code="NOT_FOUND",
        )
    screen = output.console(sys.stdout)
    if by_id:
        if (deleted := found[0].delete_time) is not None:
            when = f"Deleted {local(deleted, seconds=True)} ({relative(deleted, _now())})"
            screen.print(Text(when, "bold red"))
        tables.describe_token(screen, found[0].token)
        if page.callers:
            screen.print()
            usage.print_usage(page.callers, days=False)
        return
    _print(found)
    if position:
        output.write(sys.stderr, "There are more. Use --limit 0 for all.\n")


def _print(found: "list[FoundToken]") -> None:
    now = _now()
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False)
    for name in ("ID", "Account", "Name", "Hints", "State", "Last used"):
        table.add_column(name, overflow="fold", header_style="bold")
    for each in found:
        token = each.token
        hints = [secret.hint for secret in token.secrets] or [token.hint]
        used = token.last_used_time
        table.add_row(
            Text(visible(token.id), "cyan"),
            Text(visible(token.account_id)),
            Text(visible(token.name), "bold"),
            Text("\n".join(map(visible, hints))),
            _state(each, now),
            Text("never" if used is None else relative(used, now)),
        )
    output.console(sys.stdout).print(table)


def _state(found: "FoundToken", now: datetime) -> Text:
    token = found.token
    if found.delete_time is not None:
        return Text(f"deleted {relative(found.delete_time, now)}", "red")
    if token.disable_time is not None:
        return Text("disabled", "red")
    if token.expire_time is not None and token.expire_time <= now:
        return Text("expired", "yellow")
    return Text("active", "green")


def _now() -> datetime:
    return datetime.now(UTC)
