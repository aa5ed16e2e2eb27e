"""The command `audit`: who managed tokens, and who tried to."""

import enum
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from latchkey_cli import documents, output, service
from latchkey_cli.failures import Exit, Failure
from latchkey_cli.options import JsonOption, TargetOption, TimeoutOption
from latchkey_cli.restrictions import PAST, past
from latchkey_cli.text import visible
from latchkey_cli.times import local

if TYPE_CHECKING:
    # Types only: shell completion must not wait for gRPC to load.
    from latchkey import AuditEntry

__all__ = ["audit"]

LIMIT: Final = 50
# The service's maximum, for the fewest round trips.
PAGE_SIZE: Final = 500
_STYLES: Final = {"OK": "green", "DENIED": "bold red", "FAILED": "yellow"}
# At this width or wider, an entry takes one line. Below it, the same cells take two lines.
_WIDE: Final = 140
_GAP: Final = 2
_COLUMNS: Final = ("Time", "Caller", "Method", "Account", "Outcome", "From", "Token")
_COLUMNS_OF_TWO: Final = ("Time\nToken", "Caller\nFrom", "Method, account\nOutcome")
# The length of a token ID.
_TOKEN_WIDTH: Final = 30


class OutcomeName(enum.StrEnum):
    """An outcome as a user types it."""

    OK = "ok"
    DENIED = "denied"
    FAILED = "failed"


class MethodName(enum.StrEnum):
    """A method as a user types it."""

    CREATE = "create"
    GET = "get"
    LIST = "list"
    DELETE = "delete"
    UPDATE = "update"
    DISABLE = "disable"
    ENABLE = "enable"
    ROTATE = "rotate"
    RETIRE_SECRETS = "retire-secrets"
    REVOKE_SECRET = "revoke-secret"  # noqa: S105 - the name of a method
    REPORT_SECRET = "report-secret"  # noqa: S105 - the name of a method
    DELETE_ALL = "delete-all"
    GET_USAGE = "get-usage"
    FIND = "find"


def audit(
    action: Annotated[
        str | None,
        typer.Argument(metavar="[verify]", help="Check the log instead.", show_default=False),
    ] = None,
    account: Annotated[
        str, typer.Option("--account", "-a", metavar="ID", help="Only calls for this account.")
    ] = "",
    caller: Annotated[
        str, typer.Option("--caller", metavar="NAME", help="Only calls by this caller.")
    ] = "",
    token: Annotated[
        str | None,
        typer.Option("--token", metavar="ID", show_default=False, help="Only calls on this token."),
    ] = None,
    method: Annotated[
        MethodName | None,
        typer.Option(
            "--method", case_sensitive=False, show_default=False, help="Only this method."
        ),
    ] = None,
    outcome: Annotated[
        OutcomeName | None,
        typer.Option(
            "--outcome", case_sensitive=False, show_default=False, help="Only this outcome."
        ),
    ] = None,
    since: Annotated[
        datetime | None,
        typer.Option(
            "--since",
            parser=past,
            metavar="WHEN",
            show_default=False,
            help=f"From this time on: {PAST}",
        ),
    ] = None,
    until: Annotated[
        datetime | None,
        typer.Option(
            "--until",
            parser=past,
            metavar="WHEN",
            show_default=False,
            help="Before this time.",
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=0, metavar="N", help="At most N entries; 0 means all.")
    ] = LIMIT,
    noted: Annotated[
        str | None,
        typer.Option(
            "--noted",
            metavar="NUMBER:DIGEST",
            show_default=False,
            help="With verify: the newest batch at an earlier time.",
        ),
    ] = None,
    target: TargetOption = "127.0.0.1:50051",
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show who created, read, changed and deleted tokens, and who was denied.

    Entries are listed newest first. With --json, the output is one array. If
    the closing bracket is missing, the list is incomplete and the exit code
    says why.

    'audit verify' checks on the host of the service, with its settings, whether
    entries were changed or removed. It exits with 1 if so. It prints the newest
    batch: note it elsewhere, and pass it to --noted next time.
    """
    if action is not None or noted is not None:
        if action != "verify":
            raise Failure(
                "'audit' takes no argument other than 'verify'",
                "--noted belongs to 'audit verify'; see 'latchkey audit --help'",
                Exit.USAGE,
                code="USAGE",
            )
        service.verify_audit(noted)
    # Imported here: shell completion must not wait for gRPC to load.
    from latchkey import AuditFilter, Outcome

    from latchkey_cli.session import Doing, Session

    wanted = AuditFilter(
        account_id=account,
        token_id=token or "",
        caller=caller,
        method="" if method is None else method.value.title().replace("-", ""),
        outcome=None if outcome is None else Outcome[outcome.name],
        start_time=since,
        end_time=until,
    )
    left, page_token, printed = limit or None, "", 0
    with Session(target, timeout) as session:
        while True:
            size = PAGE_SIZE if left is None else min(left, PAGE_SIZE)
            page = session.run(
                session.client.audit_page(wanted, page_size=size, page_token=page_token),
                Doing("read the audit log"),
            )
            entries = page.entries if left is None else page.entries[:left]
            if as_json:
                for entry in entries:
                    lead = "[\n" if not printed else ",\n"
                    line = output.to_json(documents.document(entry), indent=None)
                    output.write(sys.stdout, lead + line)
                    printed += 1
            else:
                _print(entries, first=not printed)
                printed += len(entries)
            left = None if left is None else left - len(entries)
            page_token = page.next_page_token
            if not page_token or left == 0:
                break
    if as_json:
        output.write(sys.stdout, "\n]\n" if printed else "[]\n")
    elif not printed:
        output.write(sys.stderr, "No entries match.\n")


def _print(entries: "tuple[AuditEntry, ...]", *, first: bool) -> None:
    screen = output.console(sys.stdout)
    wide = screen.width >= _WIDE
    names = _COLUMNS if wide else _COLUMNS_OF_TWO
    rows = [_row(entry) if wide else _two_lines(_row(entry)) for entry in entries]
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, show_header=first)
    for number, name in enumerate(names):
        cells = (name, *(row[number].plain for row in rows))
        width = max(cell_len(line) for cell in cells for line in cell.split("\n"))
        # People copy the token ID, so it stays whole and the other columns fold.
        keeps = "Token" in name and screen.width >= 2 * _TOKEN_WIDTH
        fixed = min(width, _TOKEN_WIDTH) if keeps else None
        table.add_column(
            name,
            width=fixed,
            min_width=None if fixed else min(width, 12),
            overflow="fold",
            header_style="bold",
        )
    for row in rows:
        table.add_row(*row)
    screen.print(table)


def _row(entry: "AuditEntry") -> list[Text]:
    """Return the cells of one entry, in the order of _COLUMNS."""
    name = entry.outcome.name
    outcome = name.lower() + (f": {entry.reason}" if entry.reason else "")
    if entry.calls > 1:
        outcome += f" (× {entry.calls})"
    return [
        Text(local(entry.time, seconds=True)),
        _caller(entry),
        Text(visible(entry.method.rpartition("/")[2])),
        Text(visible(entry.account_id)),
        Text(visible(outcome), style=_STYLES.get(name, "")),
        Text(_origin(entry), style="dim"),
        Text(visible(entry.token_id), style="cyan"),
    ]


def _caller(entry: "AuditEntry") -> Text:
    if not entry.caller:
        return Text("unknown", style="dim")
    return Text(visible(f"{entry.caller} for {entry.person}" if entry.person else entry.caller))


def _origin(entry: "AuditEntry") -> str:
    """Return where a call came from: the address, and below it the trace that it belongs to."""
    address = visible(entry.client_address or entry.peer)
    return f"{address}\ntrace {visible(entry.trace_id)}" if entry.trace_id else address


def _two_lines(row: list[Text]) -> list[Text]:
    """Return the same in the order of _COLUMNS_OF_TWO."""
    time, caller, method, account, outcome, peer, token = row
    of, below = Text(" "), Text("\n")
    return [
        below.join([time, token]),
        below.join([caller, peer]),
        below.join([of.join([method, account]), outcome]),
    ]
