"""The commands that are the service's own: `serve` and `config`.

The service is another package that need not be installed, and is never imported: this process
becomes it, so that signals and exit codes are its own.
"""

import importlib.util
import os
import sys
from typing import NoReturn

from latchkey_cli.failures import Exit, Failure
from latchkey_cli.options import JsonOption

__all__ = ["config", "serve"]

_MODULE = "latchkey_service"


def serve() -> None:
    """Run the service here, until Ctrl-C.

    Its settings are environment variables; 'latchkey config' shows them. It
    brings a Postgres of its own, unless LATCHKEY_DATABASE_URL says another.
    """
    _become("serve")


def config(as_json: JsonOption = False) -> None:
    """Print the service's settings in force here, passwords redacted."""
    _become("config", *(["--json"] if as_json else []))


def _become(*arguments: str) -> NoReturn:
    if importlib.util.find_spec(_MODULE) is None:
        raise Failure(
            "the service is not installed here",
            "install it with: pip install 'latchkey[service,embedded]'",
            Exit.UNEXPECTED,
            code="SERVICE_NOT_INSTALLED",
        )
    sys.stdout.flush()
    sys.stderr.flush()
    # -P: a file in the current folder must not be taken for a module of the service.
    command = [sys.executable, "-P", "-m", _MODULE, *arguments]
    os.execv(sys.executable, command)  # nosec B606 # noqa: S606 - no shell is wanted
