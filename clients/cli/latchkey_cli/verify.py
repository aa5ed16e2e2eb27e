"""The command `verify`."""

import sys
from typing import Annotated

import typer

from latchkey_cli import documents, output, secrets, tables
from latchkey_cli.failures import Exit, Failure
from latchkey_cli.options import JsonOption, ScopeName, TargetOption, TimeoutOption

__all__ = ["verify"]

# The library's default of one second suits services that verify every request. A person, or a
# script on a busy machine, would rather wait for an answer.
TIMEOUT_SECONDS = 5.0


def verify(
    context: typer.Context,
    scope: Annotated[
        ScopeName | None,
        typer.Option(
            "--scope",
            case_sensitive=False,
            show_default=False,
            help="Scope that the token must include. Default: none.",
        ),
    ] = None,
    client_address: Annotated[
        str,
        typer.Option(
            "--client-address", metavar="IP", help="Address from which the secret is presented."
        ),
    ] = "",
    permission: Annotated[
        list[str] | None,
        typer.Option(
            "--permission",
            metavar="RESOURCE:ACTION",
            show_default=False,
            help="Permission that the token must have; may be repeated.",
        ),
    ] = None,
    target: TargetOption = "127.0.0.1:50051",
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check whether a secret is valid: exit code 0 if it is, 5 if it is not.

    The secret comes from standard input or, on a terminal, from a hidden
    prompt. It is never an argument, because everyone on the machine can see
    arguments and the shell keeps them in its history.
    """
    # main.py lets extra arguments through: the parser's error message would quote them.
    if context.args:
        raise refusal("an argument after 'verify'", "verify")
    try:
        secret = secrets.read_secret()
    except secrets.SecretInputError as error:
        what, _, to_do = str(error).partition("; ")
        raise Failure(what, to_do, Exit.USAGE, code="USAGE") from None
    # Imported here: shell completion must not wait for gRPC to load.
    from latchkey import Scope

    from latchkey_cli.session import Doing, Session

    with Session(target, timeout or TIMEOUT_SECONDS) as session:
        required_scope = None if scope is None else Scope[scope.name]
        call = session.client.verify(
            secret,
            required_scope,
            client_address=client_address,
            required_permissions=permission or (),
        )
        doing = Doing("verify", "treat the secret as invalid and try again", changes=False)
        answer = session.run(call, doing)
    if as_json:
        output.write(sys.stdout, output.to_json(documents.document(answer)) + "\n")
    else:
        tables.print_verification(output.console(sys.stdout), answer, scope, permission or ())
    if not answer.allowed:
        raise typer.Exit(Exit.NOT_VALID)


def refusal(where: str, command: str = "verify") -> Failure:
    """Return the failure for a secret on the command line. It does not quote the secret."""
    return Failure(
        f"refused {where}: secrets on the command line are visible in process lists and in the "
        "shell history",
        f"pass it on standard input ('latchkey {command} < FILE') or at the prompt; if it was a "
        "real secret, rotate the token",
        Exit.USAGE,
        code="USAGE",
    )
