"""The commands that manage tokens: `create`, `get` and `delete`."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latchkey_cli import documents, output, tables
from latchkey_cli.failures import Exit, Failure, worst
from latchkey_cli.handover import hand_over
from latchkey_cli.options import (
    AccountOption,
    ExpiresOption,
    JsonOption,
    LabelOption,
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
from latchkey_cli.text import pasted, visible
from latchkey_cli.times import NEVER

if TYPE_CHECKING:
    from latchkey import Receipt

    from latchkey_cli.session import Session

__all__ = ["create", "delete", "get"]

TARGET = "127.0.0.1:50051"
# Words that people pass as the value of a flag. `delete --yes false ID` must not delete.
_NO_IDS = frozenset({"true", "false", "yes", "no", "on", "off", "1", "0"})


def create(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name, unique among the account's tokens.")
    ],
    account: AccountOption,
    scope: Annotated[
        ScopeName,
        typer.Option(
            "--scope", case_sensitive=False, help="What the token may do; write includes read."
        ),
    ],
    expires: ExpiresOption = None,
    label: LabelOption = None,
    description: DescriptionOption = None,
    network: NetworkOption = None,
    permission: PermissionOption = None,
    rate: RateOption = None,
    burst: BurstOption = None,
    target: TargetOption = TARGET,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create a token and print its secret. The secret is never shown again.

    If standard output is not a terminal, it receives only the secret; the rest
    goes to standard error:
    latchkey create ci --scope read -a ACCOUNT > FILE

    With --json, standard output receives one object with token and secret.
    """
    labels = labels_of(label or [])
    rate_limit = rate_limit_of(rate, burst)
    expiry = expires or NEVER
    # Imported here: shell completion must not wait for gRPC to load.
    from latchkey import Scope

    from latchkey_cli.session import Doing, Session

    if_lost = (
        f"the token may exist: look for '{name}' in 'latchkey list -a {pasted(account)}' "
        "and rotate it to get a secret"
    )
    with Session(target, timeout) as session:
        call = session.client.create(
            account,
            name,
            Scope[scope.name],
            expire_time=expiry.expire_time,
            ttl=expiry.ttl,
            labels=labels,
            description=description or "",
            allowed_networks=network or (),
            permissions=permission or (),
            rate_limit=rate_limit,
        )
        created = session.run(call, Doing(f"create token '{name}'", if_lost))
    again = f"'latchkey rotate {created.token.id} -a {pasted(account)}'"
    hand_over(
        created,
        as_json=as_json,
        lost=f"get another one with {again}",
        if_not_written=f"get another secret with {again}",
    )


def get(
    token_id: Annotated[str, typer.Argument(metavar="ID", help="ID of the token.")],
    account: AccountOption,
    target: TargetOption = TARGET,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one token."""
    from latchkey_cli.session import Doing, Session

    with Session(target, timeout) as session:
        doing = Doing(f"get token '{token_id}' of account '{account}'")
        token = session.run(session.client.get(account, token_id), doing)
    if as_json:
        output.write(sys.stdout, output.to_json(documents.document(token)) + "\n")
    else:
        tables.describe_token(output.console(sys.stdout), token)


def delete(
    token_ids: Annotated[list[str], typer.Argument(metavar="ID", help="IDs of the tokens.")],
    account: AccountOption,
    yes: YesOption = False,
    no_wait: NoWaitOption = False,
    target: TargetOption = TARGET,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete tokens permanently. When the command returns, they are dead everywhere.

    It asks for confirmation before each deletion unless you pass --yes. Without
    a terminal, --yes is required. Deleting a token twice prints the same receipt.

    With --no-wait, for bulk work, it returns as soon as the deletions are
    stored. The tokens may stay valid for a few more seconds. Run the same
    command without --no-wait to confirm that they are dead.

    With several IDs, it prints each result and exits with the most severe code,
    or with 1 if nothing failed but you answered no. With --json, it prints an
    array with the receipt or error of each token.
    """
    if words := [token_id for token_id in token_ids if token_id.lower() in _NO_IDS]:
        raise Failure(
            f"'{words[0]}' is not a token ID",
            "flags such as --yes take no value; see 'latchkey delete --help'",
            Exit.USAGE,
            code="USAGE",
        )
    if not yes:
        output.require_terminal("pass --yes to delete")
    from latchkey_cli.session import Session

    codes: list[Exit] = []
    results: list[dict[str, Any]] = []
    declined = False
    with Session(target, timeout) as session:
        for token_id in token_ids:
            try:
                receipt = _delete_one(session, account, token_id, ask=not yes, no_wait=no_wait)
            except Failure as failure:
                output.report(failure, as_json=as_json)
                codes.append(failure.exit_code)
                results.append({"id": token_id, "error": failure.document()})
                if failure.exit_code is Exit.INTERRUPTED:
                    break
                continue
            if receipt is None:
                declined = True
                output.write(sys.stderr, f"Kept {visible(token_id)}.\n")
                continue
            results.append({"id": token_id, "receipt": documents.document(receipt)})
            if not as_json:
                tables.print_receipt(output.console(sys.stdout), token_id, receipt)
    if as_json:
        output.write(sys.stdout, output.to_json(results) + "\n")
    code = worst(codes)
    raise typer.Exit(Exit.UNEXPECTED if declined and code is Exit.OK else code)


def _delete_one(
    session: "Session", account: str, token_id: str, *, ask: bool, no_wait: bool
) -> "Receipt | None":
    """Delete one token and return its receipt, or None if the user declines. Raises Failure."""
    from latchkey_cli.session import Doing

    name = f"token '{token_id}' of account '{account}'"
    if ask:
        try:
            token = session.run(session.client.get(account, token_id), Doing(f"get {name}"))
        except Failure as failure:
            # The token may be deleted already. Deleting it again is harmless and gets the receipt.
            if failure.exit_code is not Exit.NOT_FOUND:
                raise
        else:
            question = f"Delete {tables.short_token(token)} of account '{visible(account)}'? [y/N] "
            if not output.confirmed(question):
                return None
    if_lost = "the token may be deleted but is not confirmed: run this again for the receipt"
    call = session.client.delete(account, token_id, no_wait=no_wait)
    return session.run(call, Doing(f"delete {name}", if_lost))
