"""The commands that are the service's own: `serve`, `config` and `policy`.

The service's libraries need not be installed, and it is never imported: this process becomes it, so
that signals and exit codes are its own.
"""

import importlib.util
import os
import sys
from typing import Annotated, NoReturn

import typer

from latchkey_cli.failures import Exit, Failure
from latchkey_cli.options import JsonOption

__all__ = ["config", "policy", "serve"]

_MODULE = "latchkey_service"
# It and the libraries of the extra `service`, which may not be installed; but for those that some
# systems do without.
_NEEDED = (
    _MODULE,
    "asyncpg",
    "cryptography",
    "dotenv",
    "grpc_health",
    "grpc_reflection",
    "platformdirs",
    "pydantic_settings",
    "structlog",
)


def serve() -> None:
    """Run the service here, until Ctrl-C.

    Its settings are environment variables; 'latchkey config' shows them. It
    brings a Postgres of its own, unless LATCHKEY_DATABASE_URL says another.
    """
    _become("serve")


def config(as_json: JsonOption = False) -> None:
    """Print the service's settings in force here, passwords redacted."""
    _become("config", *(["--json"] if as_json else []))


def policy(
    action: Annotated[
        str, typer.Argument(metavar="new-caller|check", help="What to do.", show_default=False)
    ],
    what: Annotated[
        str | None,
        typer.Argument(metavar="[NAME|FILE]", help="Of whom, or which.", show_default=False),
    ] = None,
) -> None:
    """Make a credential for a new caller, or check the service's policy file.

    'new-caller NAME' prints a credential, once and alone on standard output, and
    beside it what the policy file has of it. 'check [FILE]' says whether a policy
    file, by default LATCHKEY_POLICY, is right.
    """
    _become("policy", action, *([what] if what is not None else []))


def _become(*arguments: str) -> NoReturn:
    if any(importlib.util.find_spec(name) is None for name in _NEEDED):
        raise Failure(
            "the service is not installed here",
            "install it from a clone of Latchkey with: pip install '.[service,embedded]'",
            Exit.UNEXPECTED,
            code="SERVICE_NOT_INSTALLED",
        )
    sys.stdout.flush()
    sys.stderr.flush()
    # -P: a file in the current folder must not be taken for a module of the service.
    command = [sys.executable, "-P", "-m", _MODULE, *arguments]
    os.execv(sys.executable, command)  # nosec B606 # noqa: S606 - no shell is wanted
