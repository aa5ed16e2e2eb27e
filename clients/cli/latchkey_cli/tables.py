"""Tables and short texts for people at a console.

Every string from the service passes through `visible` into a Text. So rich never interprets a name
as markup, and the terminal never obeys it.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from latchkey_cli.text import visible
from latchkey_cli.times import local, relative

if TYPE_CHECKING:
    # Types only: shell completion must not wait for gRPC to load.
    from latchkey import (
        Change,
        Receipt,
        Status,
        Token,
        TokenSecret,
        Verification,
        VerifierStatus,
    )

__all__ = [
    "TokenTable",
    "counted",
    "describe_token",
    "print_change",
    "print_deletions",
    "print_effect",
    "print_invalidation",
    "print_receipt",
    "print_status",
    "print_verification",
    "short_token",
]

# At this width or wider, a row takes one line. Below it, the same cells take two lines.
_WIDE: Final = 110
_WIDE_TOKENS: Final = 140
_GAP: Final = 2

_VERDICTS: Final = {
    "VALID": "the secret belongs to a live token{scope}",
    "MALFORMED": "this is not a Latchkey secret: wrong format or checksum, perhaps a typo",
    "UNKNOWN": "no token has this secret",
    "DELETED": "the token was deleted",
    "DISABLED": "the token is disabled",
    "EXPIRED": "the token has expired, or the secret was replaced or revoked",
    "ADDRESS_NOT_ALLOWED": "the token may not be used from this address; see --client-address",
    "INSUFFICIENT_SCOPE": "the token is live but does not include the scope {asked}",
    "INSUFFICIENT_PERMISSIONS": "the token is live but lacks one of the permissions {permissions}",
    "RATE_LIMITED": "the token is used too often{retry}",
}


class TokenTable:
    """A table of tokens that prints page by page, so an account can have any number of tokens."""

    def __init__(self, output: Console) -> None:
        self._output = output
        self._wide = output.width >= _WIDE_TOKENS
        self._names = ["Name", "Scope", "Created", "Expires", "Hint", "Last used", "ID"]
        if not self._wide:
            self._names[0] += "\n" + self._names.pop()
            self._names[4] += "\n" + self._names.pop()
        self._widths = [max(map(cell_len, name.split("\n"))) for name in self._names]
        self._first = True

    def print_page(self, tokens: Sequence["Token"]) -> None:
        """Print `tokens` below the previous pages. Columns may widen but never narrow."""
        now = datetime.now(UTC)
        rows = [self._row(token, now) for token in tokens]
        if not rows:
            return
        for column, width in enumerate(self._widths):
            lines = (line for row in rows for line in row[column].plain.split("\n"))
            self._widths[column] = max(width, *map(cell_len, lines))
        # Only the name folds: every other column is short, or people copy its value.
        gaps = _GAP * (len(self._widths) - 1)
        room = self._output.width - sum(self._widths[1:]) - gaps
        name_width = min(self._widths[0], max(room, len("Name")))
        table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, show_header=self._first)
        for name, width in zip(self._names, [name_width, *self._widths[1:]], strict=True):
            table.add_column(name, width=width, overflow="fold", header_style="bold")
        for row in rows:
            table.add_row(*row)
        self._output.print(table)
        self._first = False

    def _row(self, token: "Token", now: datetime) -> list[Text]:
        """Return the cells of one token: one line each on a wide console, otherwise two."""
        separator = " " if self._wide else "\n"
        expires = Text("never", style="dim")
        if token.expire_time is not None:
            day = local(token.expire_time).partition(" ")[0]
            expires = _expiry(day, token.expire_time, now, separator)
        name = Text(visible(token.name), style="bold")
        token_id = Text(visible(token.id), style="cyan")
        cells = [
            name if self._wide else Text("\n").join([name, token_id]),
            _scope(token) if token.disable_time is None else _disabled(token, separator),
            Text(local(token.create_time).replace(" ", separator, 1)),
            expires,
        ]
        hint = Text(visible(token.hint), style="dim")
        if not self._wide:
            used = "-" if token.last_used_time is None else local(token.last_used_time)
            return [*cells, Text("\n").join([hint, Text(used.partition(" ")[0])])]
        used = "-" if token.last_used_time is None else relative(token.last_used_time, now)
        return [*cells, hint, Text(used), token_id]


def _grid() -> Table:
    """Return a grid of names and values."""
    grid = Table.grid(padding=(0, _GAP, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def describe_token(output: Console, token: "Token") -> None:
    """Print everything known about one token."""
    now = datetime.now(UTC)
    grid = _grid()
    grid.add_row("Name", Text(visible(token.name), style="bold"))
    grid.add_row("ID", Text(visible(token.id), style="cyan"))
    grid.add_row("Account", Text(visible(token.account_id)))
    if token.description:
        # It may have several lines.
        lines = (visible(line) for line in token.description.split("\n"))
        grid.add_row("Description", Text("\n".join(lines)))
    grid.add_row("Scope", _scope(token))
    if token.permissions:
        grid.add_row("Permissions", Text("\n".join(map(visible, token.permissions))))
    if token.allowed_networks:
        grid.add_row("Networks", Text("\n".join(map(visible, token.allowed_networks))))
    if token.rate_limit is not None:
        grid.add_row("Rate limit", Text(visible(str(token.rate_limit))))
    if token.disable_time is not None:
        disabled = local(token.disable_time, seconds=True)
        when = f"{disabled} ({relative(token.disable_time, now)})"
        grid.add_row("Disabled", Text(when, style="red"))
    grid.add_row("Created", Text(local(token.create_time, seconds=True)))
    expires = Text("never")
    if token.expire_time is not None:
        expires = _expiry(local(token.expire_time, seconds=True), token.expire_time, now, " ")
    grid.add_row("Expires", expires)
    if token.last_used_time is not None:
        used = local(token.last_used_time, seconds=True)
        by = f" by {visible(token.last_used_by)}" if token.last_used_by else ""
        grid.add_row("Last used", Text(f"{used} ({relative(token.last_used_time, now)}{by})"))
    if token.leak_report_time is not None:
        reported = local(token.leak_report_time, seconds=True)
        when = f"reported {reported} ({relative(token.leak_report_time, now)})"
        grid.add_row("Leak", Text(when, style="bold red"))
    if len(token.secrets) > 1:
        secrets = (_secret(secret, now) for secret in token.secrets)
        grid.add_row("Secrets", Text("\n").join(secrets))
    else:
        grid.add_row("Hint", Text(visible(token.hint)))
    if token.labels:
        labels = (f"{visible(key)}={visible(value)}" for key, value in sorted(token.labels.items()))
        grid.add_row("Labels", Text("\n".join(labels)))
    output.print(grid)


def _secret(secret: "TokenSecret", now: datetime) -> Text:
    """Return one of several secrets in one line."""
    text = f"{visible(secret.hint)}, created {local(secret.create_time)}"
    if secret.expire_time is not None:
        works = "works until" if secret.expire_time > now else "ended"
        text += f", {works} {local(secret.expire_time)} ({relative(secret.expire_time, now)})"
    if secret.last_used_time is not None:
        text += f", last used {relative(secret.last_used_time, now)}"
    if secret.retire_on_first_use:
        text += ", its first use ends the older ones"
    if secret.leak_report_time is not None:
        text += f", reported as leaked {relative(secret.leak_report_time, now)}"
    return Text(text)


def short_token(token: "Token") -> str:
    """Return the token in one line, with enough detail to recognise it."""
    scope = token.scope.name.lower()
    return f"'{visible(token.name)}' (scope {scope}, {visible(token.hint)}, {visible(token.id)})"


def print_invalidation(output: Console, receipt: "Receipt") -> None:
    """Print the proof that no verifier still answers from its old cache."""
    output.print(Text("Cleared the cache of every verifier", style="bold green"))
    _print_receipt(output, receipt, "Confirmed", _confirmation(receipt))


def print_receipt(output: Console, token_id: str, receipt: "Receipt") -> None:
    """Print the proof of a deletion."""
    output.print(Text.assemble(("Deleted", "bold green"), " ", (visible(token_id), "cyan")))
    _print_receipt(output, receipt, "Effective", _effect(receipt))


def print_deletions(output: Console, count: int, receipt: "Receipt | None") -> None:
    """Print the proof that many tokens are dead."""
    output.print(Text.assemble(("Deleted", "bold green"), f" {counted(count, 'token')}"))
    if receipt is not None:
        _print_receipt(output, receipt, "Effective", _effect(receipt))


def print_change(output: Console, done: str, change: "Change", *, no_wait: bool) -> None:
    """Print that a token was changed and, if that took something away, the proof."""
    token = change.token
    output.print(Text.assemble((done, "bold green"), " ", (visible(token.id), "cyan")))
    if change.receipt is not None:
        print_effect(output, change.receipt)
    elif not no_wait:
        output.print(Text("Took nothing away; verifiers follow within seconds", style="dim"))


def print_effect(output: Console, receipt: "Receipt") -> None:
    """Print the proof that a change is in effect everywhere."""
    _print_receipt(output, receipt, "Effective", _effect(receipt, "in effect"))


def _print_receipt(output: Console, receipt: "Receipt", name: str, text: str) -> None:
    grid = _grid()
    grid.add_row("Committed", Text(local(receipt.commit_time, seconds=True)))
    grid.add_row("Revision", Text(str(receipt.revision)))
    grid.add_row(name, Text(text))
    output.print(grid)


def print_verification(
    output: Console,
    answer: "Verification",
    asked_scope: str | None,
    asked_permissions: Sequence[str] = (),
) -> None:
    """Print a verdict and its token."""
    name = answer.verdict.name
    meaning = _VERDICTS.get(name, "this version of latchkey does not know the verdict: not allowed")
    meaning = meaning.format(
        scope=f" that includes the scope {asked_scope}" if asked_scope else "",
        asked=asked_scope,
        permissions=", ".join(map(visible, asked_permissions)),
        retry=_retry(answer),
    )
    style = "bold green" if answer.allowed else "bold red"
    output.print(Text.assemble((name, style), f": {meaning}"))
    if answer.token is not None:
        describe_token(output, answer.token)


def _retry(answer: "Verification") -> str:
    if answer.retry_after is None:
        return ""
    return f"; try again in {answer.retry_after.total_seconds():.1f} s"


def print_status(output: Console, status: "Status") -> None:
    """Print the server processes, how current they are, and warnings that need action."""
    number = len(status.verifiers)
    verifiers = "1 verifier" if number == 1 else f"{number} verifiers"
    # Servers of older releases do not report it.
    schema = f", schema {status.schema_version:04}" if status.schema_version else ""
    output.print(Text(f"Head revision {status.head_revision}, {verifiers}{schema}"))
    if number:
        _print_verifiers(output, status.verifiers)
        _print_databases(output, status.verifiers)
    for warning in status.warnings:
        output.print(Text.assemble(("Warning: ", "bold yellow"), visible(warning)))


def _print_verifiers(output: Console, verifiers: Sequence["VerifierStatus"]) -> None:
    wide = output.width >= _WIDE
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False)
    table.add_column("Host", overflow="fold", header_style="bold")
    for name in ("PID", "Version", "Acknowledged", "Lag", "Lease left", "Clients"):
        table.add_column(name, no_wrap=True, justify="right", header_style="bold")
    # On a narrow terminal the two share a column. They are about equally wide, so the id fits.
    for name in ("Notifications", "Pepper") if wide else ("Notifications\nPepper",):
        table.add_column(name, no_wrap=True, header_style="bold")
    for verifier in verifiers:
        *cells, notifications = _verifier(verifier)
        # Only the newest: new tokens use it, and every host must have it.
        pepper = Text(visible(verifier.pepper_ids[0]) if verifier.pepper_ids else "unknown")
        if wide:
            table.add_row(*cells, notifications, pepper)
        else:
            table.add_row(*cells, Text("\n").join([notifications, pepper]))
    output.print(table)
    for verifier in verifiers:
        if verifier.waiting_for:
            clients = ", ".join(map(visible, verifier.waiting_for))
            process = f"{visible(verifier.host)} (PID {verifier.process_id})"
            output.print(Text(f"Deletions wait for clients of {process}: {clients}", "yellow"))


def _print_databases(output: Console, verifiers: Sequence["VerifierStatus"]) -> None:
    """Print a line for each database server that grants leases; a healthy fleet has one.

    Lines below the table suffice: columns would take 50 characters and mostly repeat one value.
    """
    using: dict[str, list[str]] = {}
    for verifier in verifiers:
        process = f"{visible(verifier.host)} PID {verifier.process_id}"
        using.setdefault(_database(verifier), []).append(process)
    if len(using) == 1:
        (database,) = using
        # Older releases do not report their database.
        if database:
            output.print(Text(f"Database {database}"))
        return
    for database, processes in using.items():
        output.print(Text(f"Database {database or 'unknown'}: {', '.join(processes)}", "yellow"))


def _database(verifier: "VerifierStatus") -> str:
    """Describe the database server that a process reports, or return "" if it reports none."""
    known = [
        ("timeline", visible(verifier.timeline)),
        ("system identifier", visible(verifier.system_identifier)),
    ]
    details = ", ".join(f"{name} {value}" for name, value in known if value)
    if verifier.database_host and details:
        return f"{visible(verifier.database_host)} ({details})"
    return visible(verifier.database_host) or details


def _verifier(verifier: "VerifierStatus") -> list[Text]:
    left = verifier.lease_remaining.total_seconds()
    lease = Text(f"{left:.1f} s") if left > 0 else Text("ended", style="red")
    notifications = verifier.notifications.name
    return [
        Text(visible(verifier.host), style="bold" if verifier.answering else ""),
        Text(str(verifier.process_id)),
        Text(visible(verifier.version)),
        Text(str(verifier.acknowledged_revision)),
        Text(str(verifier.lag), style="yellow" if verifier.lag else ""),
        lease,
        Text(str(verifier.clients)),
        Text(
            "unknown" if notifications == "UNSPECIFIED" else notifications.lower(),
            style="yellow" if notifications == "SILENT" else "",
        ),
    ]


def _effect(receipt: "Receipt", state: str = "dead") -> str:
    if receipt.effective_time is None:
        return "not yet confirmed everywhere: run this again without --no-wait to confirm"
    if not receipt.verifiers_acknowledged + receipt.verifiers_outwaited:
        return f"{state} everywhere since {local(receipt.effective_time, seconds=True)}"
    return f"{state} everywhere {_confirmation(receipt)}"


def _confirmation(receipt: "Receipt") -> str:
    """Return how long the confirmation took and who confirmed."""
    effective_time = receipt.effective_time or receipt.commit_time
    milliseconds = (effective_time - receipt.commit_time).total_seconds() * 1_000
    confirmed = _servers_and_clients(receipt.verifiers_acknowledged, receipt.clients_acknowledged)
    outwaited = receipt.verifiers_outwaited + receipt.clients_outwaited
    text = f"after {milliseconds:.0f} ms: {confirmed} confirmed, {outwaited} outwaited"
    if outwaited:
        who = _servers_and_clients(receipt.verifiers_outwaited, receipt.clients_outwaited)
        text += f" ({who})"
    return text


def _servers_and_clients(servers: int, clients: int) -> str:
    return f"{counted(servers, 'server')} and {counted(clients, 'client')}"


def counted(number: int, noun: str) -> str:
    """Return for example "1 token" or "2 tokens"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _scope(token: "Token") -> Text:
    # Tokens that can change things must stand out.
    style = "yellow" if token.scope.name == "WRITE" else ""
    return Text(token.scope.name.lower(), style=style)


def _disabled(token: "Token", separator: str) -> Text:
    return Text.assemble(_scope(token), separator, ("disabled", "red"))


def _expiry(text: str, moment: datetime, now: datetime, separator: str) -> Text:
    hint = relative(moment, now)
    if moment <= now:
        return Text(f"{text}{separator}expired", style="red")
    return Text(f"{text}{separator}{hint if separator != ' ' else f'({hint})'}")
