"""The command `import`: creates tokens from the hashes of existing secrets."""

import asyncio
import io
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TextIO

import typer

from latchkey_cli import import_file, output
from latchkey_cli.failures import Exit, Failure
from latchkey_cli.import_file import FileError, FileRow, RowError
from latchkey_cli.options import (
    ExpiresOption,
    JsonOption,
    LabelOption,
    ScopeName,
    TargetOption,
    TimeoutOption,
    labels_of,
)
from latchkey_cli.text import visible
from latchkey_cli.times import Expiry

if TYPE_CHECKING:
    # Types only: shell completion must not wait for gRPC to load.
    from latchkey import Client, ImportedToken, ImportResult, LatchkeyError

    from latchkey_cli.session import Session

__all__ = ["import_tokens"]

TARGET: Final = "127.0.0.1:50051"
# With --number-names: the last number that is tried. An account with more tokens of one name needs
# better names.
NUMBER_MAX: Final = 100
_NAME_LENGTH_MAX: Final = 64
# For each batch. Longer than a failover, and than any queue of the service takes.
PATIENCE_SECONDS: Final = 60.0
# The same before the service has answered, because the target may be wrong. Restarts take less.
START_PATIENCE_SECONDS: Final = 15.0
# From one attempt to the next while the service restarts, which takes a few seconds.
RESTART_RETRY_SECONDS: Final = 1.0
# Refused rows in JSON output.
_LISTED_MAX: Final = 10_000
# The service's fields, by the name of the column that they come from.
_COLUMNS: Final = {
    "secret_sha256": "hash",
    "account_id": "account",
    "expire_time": "expires",
    "create_time": "created",
    "allowed_networks": "networks",
    "rate_limit.count": "rate",
    "rate_limit.period": "rate",
    "rate_limit.burst": "rate",
}


@dataclass
class _Progress:
    """What has been done so far."""

    source: str
    dry_run: bool
    as_json: bool
    target: str = TARGET
    counts: Counter[str] = field(default_factory=Counter)
    refused: list[RowError] = field(default_factory=list)
    lines: int = 0
    # Whether the service has answered, so that the target is right.
    answered: bool = False
    # Whether the person has been told that it has not.
    waiting: bool = False

    def refuse(self, error: RowError) -> None:
        """Count a refused row, and print why."""
        self.counts["refused"] += 1
        if len(self.refused) < _LISTED_MAX:
            self.refused.append(error)
        if not self.as_json:
            self.clear()
            column = f"{error.column}: " if error.column else ""
            text = visible(f"{self.source}:{error.line}: {column}{error.problem}")
            output.write(sys.stderr, f"{text}\n")

    def show(self) -> None:
        """Show how far the import is, if a person is watching."""
        if output.is_terminal(sys.stderr):
            done = self.counts["imported"] + self.counts["exists"]
            output.write(sys.stderr, f"\r\x1b[K{self.lines:,} lines read, {done:,} tokens there")

    def waits(self) -> None:
        """Say, once, that nothing answers yet: the target may be wrong."""
        if not self.waiting:
            self.waiting = True
            text = (
                f"nothing answers at {self.target}; trying again for {START_PATIENCE_SECONDS:g} s"
            )
            output.write(sys.stderr, visible(text) + "\n")

    def clear(self) -> None:
        """Remove the line of `show`."""
        if output.is_terminal(sys.stderr):
            output.write(sys.stderr, "\r\x1b[K")


def import_tokens(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="CSV, or JSON lines if it ends in .jsonl; - reads CSV."
        ),
    ],
    account: Annotated[
        str | None,
        typer.Option(
            "--account",
            "-a",
            envvar="LATCHKEY_ACCOUNT",
            metavar="ID",
            show_default=False,
            help="Account of rows that name none.",
        ),
    ] = None,
    scope: Annotated[
        ScopeName | None,
        typer.Option(
            "--scope", case_sensitive=False, show_default=False, help="Scope of rows without one."
        ),
    ] = None,
    expires: ExpiresOption = None,
    label: LabelOption = None,
    number_names: Annotated[
        bool,
        typer.Option("--number-names", help="If a name is taken, add a number to it."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Import nothing; print what would be done.")
    ] = False,
    stop_on_error: Annotated[
        bool, typer.Option("--stop-on-error", help="Stop at the first row that is refused.")
    ] = False,
    jsonl: Annotated[
        bool, typer.Option("--jsonl", help="Read JSON lines, whatever the file's name.")
    ] = False,
    target: TargetOption = TARGET,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create tokens for existing secrets, from the hashes of these secrets.

    Each row contains the SHA-256 hash of a whole secret, in hexadecimal or base64,
    in the column 'hash'. Other columns: account, name, scope, expires, created,
    hint, description, networks, permissions, rate, enabled, and label.NAME.

    It is safe to run this again: rows whose secrets are already imported are
    skipped. A row that is refused does not stop the others. The exit code is 2 if
    any row is refused.
    """
    progress = _Progress("standard input" if file == "-" else file, dry_run, as_json, target)
    defaults = _Defaults(account, scope, expires or Expiry(), labels_of(label or []))
    from latchkey_cli.session import Session

    with _opened(file) as stream, Session(target, timeout) as session:
        rows = _rows(stream, jsonl or file.endswith(".jsonl"), defaults, progress, stop_on_error)
        for batch in import_file.batches(rows, lambda row: _size_of(row.token)):
            _send(session, batch, progress, number_names=number_names)
            progress.show()
            if stop_on_error and progress.counts["refused"]:
                break
    progress.clear()
    _summarise(progress)
    if progress.counts["refused"]:
        raise typer.Exit(Exit.USAGE)


@dataclass(frozen=True, slots=True)
class _Defaults:
    """The values of rows that have none."""

    account: str | None
    scope: ScopeName | None
    expiry: Expiry
    labels: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Line:
    """A token to import, with the number of its line."""

    line: int
    token: "ImportedToken"


@contextmanager
def _opened(file: str) -> Iterator[TextIO]:
    if file == "-":
        if sys.stdin is None:
            raise _unreadable(file, "standard input is closed")
        # With the encoding of files, whatever the locale.
        yield io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline="")
        return
    try:
        stream = Path(file).open(encoding="utf-8-sig", newline="")  # noqa: SIM115 - closed below
    except OSError as error:
        raise _unreadable(file, error.strerror or "cannot be opened") from None
    with stream:
        yield stream


def _unreadable(file: str, why: str) -> Failure:
    return Failure(f"cannot read {file}: {why}", "name a file", Exit.USAGE, code="USAGE")


def _rows(
    stream: TextIO,
    lines_of_json: bool,
    defaults: _Defaults,
    progress: _Progress,
    stop_on_error: bool,
) -> Iterator[_Line]:
    """Yield the tokens of the rows that can be sent. Counts the others."""
    try:
        for row in import_file.read(stream, lines_of_json=lines_of_json):
            progress.lines = row.line
            made = row if isinstance(row, RowError) else _token(row, defaults)
            if isinstance(made, RowError):
                progress.refuse(made)
                if stop_on_error:
                    return
            elif made is None:
                progress.counts["expired"] += 1
            else:
                yield _Line(row.line, made)
    except FileError as error:
        progress.clear()
        where = f"line {error.line} of {progress.source}" if error.line else progress.source
        raise Failure(
            f"{where} {error}",
            "correct it and run this again, which skips what is already imported",
            Exit.USAGE,
            code="USAGE",
        ) from None


def _token(row: FileRow, defaults: _Defaults) -> "ImportedToken | RowError | None":
    """Return a row's token, or what is wrong with the row, or None if it has expired."""
    from latchkey import ImportedToken, RateLimit, Scope

    now = datetime.now(UTC)
    account, scope = row.account or defaults.account, row.scope or defaults.scope
    if account is None:
        return RowError(row.line, "account", "is required; or give --account")
    if scope is None:
        return RowError(row.line, "scope", "is required; or give --scope")
    expiry = defaults.expiry
    expires = row.expires or (now + expiry.ttl if expiry.ttl else expiry.expire_time)
    if expires is not None and expires <= now:
        return None
    try:
        rate_limit = None if row.rate is None else RateLimit.parse(row.rate)
    except ValueError:
        return RowError(row.line, "rate", "must be a rate such as 100/minute")
    return ImportedToken(
        account_id=account,
        name=row.name or f"imported, line {row.line}",
        scope=Scope(str(scope)),
        secret_sha256=row.secret_sha256,
        hint=row.hint,
        create_time=row.created,
        expire_time=expires,
        labels={**defaults.labels, **row.labels},
        description=row.description,
        allowed_networks=row.networks,
        permissions=row.permissions,
        rate_limit=rate_limit,
        disabled=not row.enabled,
    )


def _size_of(token: "ImportedToken") -> int:
    """Return a size in bytes that the encoded token does not exceed."""
    texts = [token.account_id, token.name, token.hint, token.description]
    texts += [*token.allowed_networks, *token.permissions]
    for pair in token.labels.items():
        texts += pair
    # Each text has a tag and a length, and each label two more. Hash and times take 70 bytes.
    return 100 + sum(len(text.encode("utf-8", "replace")) + 6 for text in texts)


def _send(
    session: "Session", batch: list[_Line], progress: _Progress, *, number_names: bool
) -> None:
    """Import a batch, with numbers added to names that are taken if that is wanted."""
    from latchkey import ImportOutcome

    names = {one.line: one.token.name for one in batch}
    for number in range(2, NUMBER_MAX + 2):
        taken = []
        for one, result in zip(batch, _call(session, batch, progress), strict=True):
            match result.outcome:
                case ImportOutcome.IMPORTED:
                    progress.counts["imported"] += 1
                case ImportOutcome.EXISTS:
                    progress.counts["exists"] += 1
                case ImportOutcome.NAME_TAKEN if number_names and number <= NUMBER_MAX:
                    taken.append(one)
                case _:
                    _refuse(one.line, result, progress)
        if not taken:
            return
        batch = [
            replace(one, token=replace(one.token, name=_numbered(names[one.line], number)))
            for one in taken
        ]


def _numbered(name: str, number: int) -> str:
    suffix = f" {number}"
    return name[: _NAME_LENGTH_MAX - len(suffix)] + suffix


def _call(
    session: "Session", batch: list[_Line], progress: _Progress
) -> "tuple[ImportResult, ...]":
    from latchkey_cli.session import Doing

    doing = Doing(
        f"import lines {batch[0].line} to {batch[-1].line}",
        "run this again, which is safe: it skips what is already imported",
        # Whether this call was sent or not, earlier batches have changed something.
        changes=False,
    )
    tokens = [one.token for one in batch]
    try:
        results = session.run(_import(session.client, tokens, progress), doing)
    except Failure:
        progress.clear()
        raise
    progress.answered = True
    return results


async def _import(
    client: "Client", tokens: "Sequence[ImportedToken]", progress: _Progress
) -> "tuple[ImportResult, ...]":
    """Import tokens. Try again for a while if the service asks for that, or seems to restart.

    The library's own attempts last a second or two. That is right for a caller who waits, but an
    import of hours must not fail because others import too, or because the database fails over.
    """
    from latchkey import ResourceExhausted, Unavailable

    began = time.monotonic()
    patience = PATIENCE_SECONDS
    while True:
        try:
            return await client.import_tokens(tokens, validate_only=progress.dry_run)
        except (ResourceExhausted, Unavailable) as error:
            if error.retry_after is not None:
                progress.answered = True
                pause = error.retry_after.total_seconds()
            elif _may_restart(error, progress):
                pause = RESTART_RETRY_SECONDS
            else:
                raise
            patience = PATIENCE_SECONDS if progress.answered else START_PATIENCE_SECONDS
            if time.monotonic() + pause >= began + patience:
                raise
            if not progress.answered:
                progress.waits()
        await asyncio.sleep(pause)


def _may_restart(error: "LatchkeyError", progress: _Progress) -> bool:
    """Return whether the service may be restarting: nothing answers, or connections are closed.

    A refusal without a delay does not pass by itself. Nor does a failed TLS handshake, and a
    service that has closed all connections so far probably requires TLS.
    """
    from latchkey import Unavailable

    if not isinstance(error, Unavailable) or error.reason == "TLS_HANDSHAKE_FAILED":
        return False
    return progress.answered or error.reason is None


def _refuse(line: int, result: "ImportResult", progress: _Progress) -> None:
    name = result.outcome.name
    if name == "NAME_TAKEN":
        problem = "a live token of the account has this name; --number-names adds a number"
        progress.refuse(RowError(line, "name", problem))
    elif name == "OTHER_ACCOUNT":
        progress.refuse(RowError(line, "hash", "a token of another account has this secret"))
    elif not result.field_violations:
        progress.refuse(RowError(line, "", f"Latchkey did not import it ({name})"))
    else:
        # One row is one refusal, even if several of its fields are wrong.
        first, *more = result.field_violations
        path, bracket, rest = first.field.partition("[")
        column = _COLUMNS.get(path, path) + bracket + rest
        others = "".join(f"; {v.field}: {v.description}" for v in more)
        progress.refuse(RowError(line, column, first.description + others))


def _summarise(progress: _Progress) -> None:
    counts = progress.counts
    if progress.as_json:
        document: dict[str, Any] = {
            "dry_run": progress.dry_run,
            **{name: counts[name] for name in ("imported", "exists", "expired", "refused")},
            "refused_rows": [
                {"line": e.line, "column": e.column, "problem": e.problem} for e in progress.refused
            ],
        }
        output.write(sys.stdout, output.to_json(document) + "\n")
        return
    rows = [
        ("would be imported" if progress.dry_run else "imported", counts["imported"]),
        ("already imported, skipped", counts["exists"]),
        ("expired, skipped", counts["expired"]),
        ("refused", counts["refused"]),
    ]
    shown = "".join(f"{words}: {count:,}\n" for words, count in rows if count or words != "refused")
    output.write(sys.stdout, shown)
