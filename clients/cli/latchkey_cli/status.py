"""The command `status`."""

import sys

from latchkey_cli import documents, output, tables
from latchkey_cli.options import JsonOption, TargetOption, TimeoutOption

__all__ = ["status"]


def status(
    target: TargetOption = "127.0.0.1:50051",
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the server processes and how current each one is.

    A deletion waits until every verifier has acknowledged its revision or its
    lease has expired. Lag is the number of revisions that a verifier has not
    acknowledged yet. It returns to 0 within moments unless a verifier hangs or
    is cut off.
    """
    from latchkey_cli.session import Doing, Session

    with Session(target, timeout) as session:
        answer = session.run(session.client.status(), Doing("get the status"))
    if as_json:
        output.write(sys.stdout, output.to_json(documents.document(answer)) + "\n")
    else:
        tables.print_status(output.console(sys.stdout), answer)
