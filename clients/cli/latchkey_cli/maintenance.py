"""The command `invalidate-all`."""

import sys

import typer

from latchkey_cli import documents, output, tables
from latchkey_cli.failures import Exit
from latchkey_cli.options import JsonOption, TargetOption, TimeoutOption, YesOption

__all__ = ["invalidate_all"]


def invalidate_all(
    yes: YesOption = False,
    target: TargetOption = "127.0.0.1:50051",
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Clear the cache of every server process and every client library.

    Run it after you restore the database from a backup, or in an emergency.
    It changes no token. Once it returns, every new verify reads the database
    again, so verifies are slower until the caches have filled.

    It asks for confirmation unless you pass --yes. Without a terminal, --yes
    is required.
    """
    if not yes:
        output.require_terminal("pass --yes to continue")
        if not output.confirmed("Clear the cache of every verifier? [y/N] "):
            raise typer.Exit(Exit.UNEXPECTED)
    from latchkey_cli.session import Doing, Session

    doing = Doing(
        "clear all caches",
        "run this command again; that is safe",
        unconfirmed="not every verifier confirmed in time that its cache is empty",
        if_unconfirmed="run this command again",
    )
    with Session(target, timeout) as session:
        receipt = session.run(session.client.invalidate_all(), doing)
    if as_json:
        output.write(sys.stdout, output.to_json(documents.document(receipt)) + "\n")
    else:
        tables.print_invalidation(output.console(sys.stdout), receipt)
