"""The commands that end many secrets or tokens: `revoke` and `delete-all`."""

import sys
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from latchkey_cli import documents, output, secrets, tables, verify
from latchkey_cli.failures import Exit, Failure
from latchkey_cli.options import (
    AccountOption,
    JsonOption,
    NoWaitOption,
    TargetOption,
    TimeoutOption,
    YesOption,
)
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
from latchkey_cli.tables import counted
from latchkey_cli.text import visible

if TYPE_CHECKING:
    # Types only: shell completion must not wait for gRPC to load.
    from latchkey import Deletions, Receipt, SecretOutcome, TokenFilter

    from latchkey_cli.session import Session

__all__ = ["delete_all", "revoke"]

TARGET: Final = "127.0.0.1:50051"
# The service's maximum for one call.
BATCH_MAX: Final = 1_000
_MEANINGS: Final = {
    "ENDED": "ended",
    "ENDED_BEFORE": "had ended before",
    "UNKNOWN": "no token has this secret",
    "MALFORMED": "not a secret of Latchkey",
    "UNSPECIFIED": "this version of latchkey does not know the outcome",
}
_DEAD: Final = ("ENDED", "ENDED_BEFORE")


def revoke(
    context: typer.Context,
    no_wait: NoWaitOption = False,
    target: TargetOption = TARGET,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """End leaked secrets, one a line on standard input. Their tokens stay.

    When the command returns, the secrets are dead everywhere. The owners of the
    tokens can rotate them. It prints the outcome of each line, and no secret.
    On a terminal, it asks for one secret at a hidden prompt.

    The exit code is 0 if every secret is dead, and 3 if a line is not a secret
    of a token. If a call fails, the lines before it are done, and the command
    says from which line on to run it again. That is safe.

    With --json, the output is one array, with an object for each 1,000 lines.
    If the closing bracket is missing, a call failed.
    """
    # main.py lets extra arguments through: the parser's error message would quote them.
    if context.args:
        raise verify.refusal("an argument after 'revoke'", "revoke")
    from latchkey_cli.session import Doing, Session

    outcomes: Counter[str] = Counter()
    receipt: Receipt | None = None
    printed = 0
    with Session(target, timeout) as session:
        for batch in _batches():
            lines = [line for line, _ in batch]
            doing = Doing(
                f"revoke the secrets from line {lines[0]} on",
                f"run this again with the lines from {lines[0]} on, which is safe",
                unconfirmed=f"the secrets up to line {lines[-1]} are ended, but not every verifier "
                "confirmed that in time",
                if_unconfirmed=f"run this again with the lines from {lines[0]} on",
            )
            call = session.client.revoke_secrets([text for _, text in batch], no_wait=no_wait)
            revocation = session.run(call, doing)
            receipt = revocation.receipt or receipt
            outcomes.update(outcome.name for outcome in revocation.outcomes)
            results = list(zip(lines, revocation.outcomes, strict=True))
            if as_json:
                document = {
                    "results": [_result(line, outcome) for line, outcome in results],
                    "receipt": documents.document(revocation.receipt),
                }
                lead = ",\n" if printed else "[\n"
                output.write(sys.stdout, lead + output.to_json(document, indent=None))
            else:
                shown = (f"line {line}: {_MEANINGS[outcome.name]}\n" for line, outcome in results)
                output.write(sys.stdout, "".join(shown))
            printed += len(batch)
            if len(batch) == BATCH_MAX:
                output.write(sys.stderr, f"{printed} lines done.\n")
    if not printed:
        raise Failure(
            "there is no secret on standard input", "pass one a line", Exit.USAGE, code="USAGE"
        )
    if as_json:
        output.write(sys.stdout, "\n]\n")
    else:
        _summarise(outcomes, receipt)
    if outcomes.total() > sum(outcomes[name] for name in _DEAD):
        raise typer.Exit(Exit.NOT_FOUND)


def _batches() -> Iterator[list[tuple[int, str]]]:
    """Yield secrets with the numbers of their lines, at most BATCH_MAX at once."""
    batch: list[tuple[int, str]] = []
    try:
        for number, text in secrets.read_lines():
            batch.append((number, text))
            if len(batch) == BATCH_MAX:
                yield batch
                batch = []
    except secrets.SecretInputError as error:
        what, _, to_do = str(error).partition("; ")
        raise Failure(what, to_do, Exit.USAGE, code="USAGE") from None
    if batch:
        yield batch


def _result(line: int, outcome: "SecretOutcome") -> dict[str, Any]:
    return {"line": line, "outcome": documents.document(outcome)}


def _summarise(outcomes: "Counter[str]", receipt: "Receipt | None") -> None:
    parts = [f"{outcomes[name]} {text}" for name, text in _SUMMARY.items() if outcomes[name]]
    output.write(sys.stderr, f"{counted(outcomes.total(), 'secret')}: {', '.join(parts)}.\n")
    if receipt is not None:
        # The last one: revisions are applied in order, so it covers the earlier calls.
        tables.print_effect(output.console(sys.stderr), receipt)


_SUMMARY: Final = {
    "ENDED": "ended",
    "ENDED_BEFORE": "had ended before",
    "UNKNOWN": "unknown",
    "MALFORMED": "malformed",
    "UNSPECIFIED": "with an outcome that this version of latchkey does not know",
}


def delete_all(
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be deleted, and delete nothing.")
    ] = False,
    yes: YesOption = False,
    no_wait: NoWaitOption = False,
    target: TargetOption = TARGET,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete all tokens of an account, or those that match every given filter.

    When the command returns, they are dead everywhere. It counts them first and
    asks for confirmation unless you pass --yes. Without a terminal, --yes is
    required.

    It deletes the oldest first, up to 1,000 in one call. If a call fails, run
    the command again: it deletes what is left.

    With --json, the output is one object with the count and the last receipt,
    which also covers the earlier calls. With --dry-run, it contains the count and
    the first 500 tokens.
    """
    if not yes and not dry_run:
        output.require_terminal("pass --yes to delete, or --dry-run to see what would be deleted")
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
    from latchkey_cli.session import Doing, Session

    with Session(target, timeout) as session:
        found: Deletions | None = None
        if not yes or dry_run:
            call = session.client.delete_all(account, wanted, dry_run=True)
            found = session.run(call, Doing(f"count the tokens of account '{account}'"))
        if dry_run and found is not None:
            _print_found(found, account, as_json=as_json)
            return
        if found is not None and found.count:
            tokens = counted(found.count, "token")
            question = f"Delete {tokens} of account '{visible(account)}' permanently? [y/N] "
            if not output.confirmed(question):
                raise typer.Exit(Exit.UNEXPECTED)
        count, receipt = _delete(session, account, wanted, no_wait=no_wait)
    if as_json:
        document = {"count": count, "receipt": documents.document(receipt)}
        output.write(sys.stdout, output.to_json(document) + "\n")
    elif not count:
        output.write(sys.stderr, f"Account '{visible(account)}' has no such tokens.\n")
    else:
        tables.print_deletions(output.console(sys.stdout), count, receipt)


def _delete(
    session: "Session", account: str, wanted: "TokenFilter", *, no_wait: bool
) -> "tuple[int, Receipt | None]":
    """Delete until nothing matches. Return how many tokens were deleted, and the last receipt."""
    from latchkey_cli.session import Doing

    count, receipt = 0, None
    while True:
        done = f"{counted(count, 'token')} deleted before; " if count else ""
        doing = Doing(
            f"delete tokens of account '{account}'",
            f"{done}more may be deleted but are not confirmed: run this again, which is safe",
            unconfirmed="the tokens are deleted, but not every verifier confirmed that in time",
        )
        call = session.client.delete_all(account, wanted, no_wait=no_wait)
        deletions = session.run(call, doing)
        count += deletions.count
        receipt = deletions.receipt or receipt
        # A call that deletes nothing ends the loop, whatever it says about more.
        if not deletions.more or not deletions.count:
            return count, receipt
        output.write(sys.stderr, f"Deleted {counted(count, 'token')}, going on.\n")


def _print_found(found: "Deletions", account: str, *, as_json: bool) -> None:
    if as_json:
        document = {"count": found.count, "tokens": documents.document(found.tokens)}
        output.write(sys.stdout, output.to_json(document) + "\n")
        return
    if not found.count:
        output.write(sys.stderr, f"Account '{visible(account)}' has no such tokens.\n")
        return
    table = tables.TokenTable(output.console(sys.stdout))
    table.print_page(found.tokens)
    rest = found.count - len(found.tokens)
    more = f" The table shows the oldest {len(found.tokens)}." if rest else ""
    what = counted(found.count, "token")
    output.write(sys.stderr, f"Without --dry-run, this deletes {what}.{more}\n")
