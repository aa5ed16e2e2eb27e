"""The command `invalidate-all`."""

import sys
from typing import Annotated

import typer

from latchkey_cli import documents, output, tables
from latchkey_cli.failures import Exit, Failure
from latchkey_cli.options import JsonOption, TargetOption, TimeoutOption

__all__ = ["invalidate_all"]


def invalidate_all(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    target: TargetOption = "127.0.0.1:50051",
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Empty the memory of every server process and every client library.

    Run it after you restore the database from a backup, and in emergencies.
    It changes no token. When it is done, every verify that starts afterwards
    rests on a new read of the database; verifies are slower until the
    memories have filled again.

    It asks first, unless --yes is given; without a terminal to ask on, --yes
    is required.
    """
    if not yes:
        if not (output.is_terminal(sys.stdin) and output.is_terminal(sys.stderr)):
            raise Failure(
                "there is no terminal to ask on", "pass --yes to go on", Exit.USAGE, code="USAGE"
            )
        if not output.confirmed("Empty the memory of every verifier? [y/N] "):
            raise typer.Exit(Exit.UNEXPECTED)
    from latchkey_cli.session import Doing, Session

    doing = Doing(
        "empty all memories",
        "run this again: that does no harm",
        unconfirmed="not every verifier has confirmed in time that its memory is empty",
        if_unconfirmed="run this again",
    )
    with Session(target, timeout) as session:
        receipt = session.run(session.client.invalidate_all(), doing)
    if as_json:
        output.write(sys.stdout, output.to_json(documents.receipt(receipt)) + "\n")
    else:
        tables.print_invalidation(output.console(sys.stdout), receipt)
