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
from latchkey_console import grpc_core

from latchkey_cli.failures import Exit, Failure
from latchkey_cli.options import JsonOption

__all__ = [
    "config",
    "dev_ca",
    "doctor",
    "migrate",
    "policy",
    "schema_number",
    "serve",
    "verify_audit",
]

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
    url_file: Annotated[
        Path | None,
        typer.Option(
            "--database-url-file",
            metavar="FILE",
            show_default="LATCHKEY_MIGRATION_URL",
            help="File with the database URL of the owner; - for standard input.",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 if a migration is missing.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the SQL, and change nothing.")
    ] = False,
) -> None:
    """Bring the database to this release, as the owner of its tables.

    Needed only if the service runs with a role that may not change tables, or
    with LATCHKEY_MIGRATE=off. LATCHKEY_MIGRATION_URL or --database-url-file gives
    the URL of the owner, otherwise LATCHKEY_DATABASE_URL. --grant gives the role
    of the service its rights, and no others.
    """
    options = [] if role is None else [f"--grant={role}"]
    options += [] if url_file is None else [f"--database-url-file={url_file}"]
    options += ["--check"] if check else []
    options += ["--dry-run"] if dry_run else []
    _become("migrate", *options)


def doctor(
    as_json: JsonOption = False,
    host: Annotated[
        str | None,
        typer.Option(
            "--host",
            metavar="NAME",
            show_default="host of LATCHKEY_TLS_LISTEN",
            help="Name by which clients reach the TLS listener.",
        ),
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(
            "--ca", metavar="FILE", show_default=False, help="CAs that clients trust, in PEM."
        ),
    ] = None,
) -> None:
    """Check this host's settings, files, database and addresses.

    Run it where the service runs, with its environment and as its user. It
    changes nothing, and works while the service is down. It exits with 1 if a
    check failed.
    """
    options = ["--json"] if as_json else []
    options += [] if host is None else [f"--host={host}"]
    options += [] if ca is None else [f"--ca={ca}"]
    _become("doctor", *options)


def verify_audit(noted: str | None) -> None:
    """Check the audit log on the host of the service."""
    _become("audit", "verify", *([] if noted is None else [f"--noted={noted}"]))


def schema_number() -> str | None:
    """Return the number of the newest migration of the service here, or None without a service."""
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or spec.origin is None:
        return None
    files = Path(spec.origin).parent.glob("postgres/migrations/[0-9][0-9][0-9][0-9]_*.sql")
    return max((file.name[:4] for file in files), default=None)


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
    os.execve(sys.executable, command, grpc_core.for_the_service())  # noqa: S606 - no shell needed
