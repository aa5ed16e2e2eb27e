"""The command `list`."""

import enum
import sys
from typing import TYPE_CHECKING, Annotated, Final

import typer

from latchkey_cli import documents, output, tables
from latchkey_cli.options import AccountOption, JsonOption, TargetOption, TimeoutOption
from latchkey_cli.restrictions import (
    CanWriteOption,
    ExpiresBeforeOption,
    FilterLabelOption,
    FilterScopeOption,
    LeakedOption,
    NameContainsOption,
    NeverExpiresOption,
    NeverUsedOption,
    SearchOption,
    SecretCreatedBeforeOption,
    StateOption,
    UnusedSinceOption,
    token_filter,
)
from latchkey_cli.text import visible

if TYPE_CHECKING:
    # Types only: shell completion must not wait for gRPC to load.
    from latchkey import TokenFilter, TokenOrder

    from latchkey_cli.session import Session

__all__ = ["list_tokens"]

TARGET: Final = "127.0.0.1:50051"
# The service's maximum, for the fewest round trips.
PAGE_SIZE: Final = 500


class OrderName(enum.StrEnum):
    """An order as a user types it."""

    NEWEST = "newest"
    EXPIRY = "expiry"
    LAST_USE = "last-use"


def list_tokens(
    account: AccountOption,
    scope: FilterScopeOption = None,
    name_contains: NameContainsOption = None,
    label: FilterLabelOption = None,
    state: StateOption = None,
    expires_before: ExpiresBeforeOption = None,
    unused_since: UnusedSinceOption = None,
    can_write: CanWriteOption = None,
    search: SearchOption = None,
    never_used: NeverUsedOption = None,
    never_expires: NeverExpiresOption = None,
    secret_created_before: SecretCreatedBeforeOption = None,
    leaked: LeakedOption = None,
    order: Annotated[
        OrderName,
        typer.Option(
            "--order", case_sensitive=False, metavar="ORDER", help="newest, expiry or last-use."
        ),
    ] = OrderName.NEWEST,
    reverse: Annotated[bool, typer.Option("--reverse", help="The opposite order.")] = False,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, metavar="N", show_default=False, help="At most N tokens."),
    ] = None,
    count: Annotated[
        bool, typer.Option("--count", help="Print only how many tokens there are.")
    ] = False,
    target: TargetOption = TARGET,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the live tokens of the account, or those that match every given filter.

    Orders: newest first; expiry, the earliest first and those that never expire
    last; last-use, those that were never used first, then the earliest last use.

    With --json, the output is one array. If the closing bracket is missing,
    the list is incomplete and the exit code says why.

    With --count, the output is a number. It is a lower bound for an account with
    more than 10,000 tokens, which a message on standard error then says. With
    --json, the output is one object with the count and whether it is capped.
    """
    wanted = token_filter(
        scope,
        name_contains,
        label,
        state,
        expires_before,
        unused_since,
        can_write,
        search,
        never_used,
        never_expires,
        secret_created_before,
        leaked,
    )
    # Imported here: shell completion must not wait for gRPC to load.
    from latchkey import TokenOrder

    from latchkey_cli.session import Session

    with Session(target, timeout) as session:
        if count:
            _count(session, account, wanted, as_json=as_json)
        else:
            _list(session, account, wanted, TokenOrder[order.name], reverse, limit, as_json)


def _count(session: "Session", account: str, wanted: "TokenFilter", *, as_json: bool) -> None:
    from latchkey_cli.session import Doing

    call = session.client.list_page(account, wanted, page_size=1, include_total_size=True)
    page = session.run(call, Doing(f"count the tokens of account '{account}'"))
    if as_json:
        document = {"count": page.total_size, "capped": page.total_size_capped}
        output.write(sys.stdout, output.to_json(document) + "\n")
        return
    output.write(sys.stdout, f"{page.total_size}\n")
    if page.total_size_capped:
        output.write(sys.stderr, "There may be more: the account has more than 10000 tokens.\n")


def _list(
    session: "Session",
    account: str,
    wanted: "TokenFilter",
    order: "TokenOrder",
    reverse: bool,
    limit: int | None,
    as_json: bool,
) -> None:
    from latchkey import TokenFilter

    from latchkey_cli.session import Doing

    doing = Doing(f"list the tokens of account '{account}'")
    table = tables.TokenTable(output.console(sys.stdout))
    left, page_token, printed = limit, "", 0
    while True:
        page = session.run(
            session.client.list_page(
                account,
                wanted,
                order=order,
                reverse=reverse,
                page_size=PAGE_SIZE if left is None else min(left, PAGE_SIZE),
                page_token=page_token,
            ),
            doing,
        )
        tokens = page.tokens if left is None else page.tokens[:left]
        if as_json:
            for number, token in enumerate(tokens, start=printed):
                start = ",\n" if number else "[\n"
                line = output.to_json(documents.document(token), indent=None)
                output.write(sys.stdout, start + line)
        else:
            table.print_page(tokens)
        printed += len(tokens)
        left = None if left is None else left - len(tokens)
        # A repeated page token would loop forever. An empty page need not be the last one.
        if left == 0 or page.next_page_token in ("", page_token):
            break
        page_token = page.next_page_token
    if as_json:
        output.write(sys.stdout, "\n]\n" if printed else "[]\n")
    elif not printed:
        what = "no tokens" if wanted == TokenFilter() else "no such tokens"
        output.write(sys.stderr, f"Account '{visible(account)}' has {what}.\n")
