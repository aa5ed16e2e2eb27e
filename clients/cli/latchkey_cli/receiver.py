"""The command `receiver`, which receives reports of leaked secrets over HTTP.

The receiver is part of the package of the console, and needs the libraries of its extra.
"""

from pathlib import Path
from typing import Annotated, Any, Final

import typer
from latchkey_console import extra

from latchkey_cli import access
from latchkey_cli.failures import Exit, Failure
from latchkey_cli.options import TargetOption

__all__ = ["receiver"]

PREFIX: Final = "LATCHKEY_RECEIVER_"


def _option(variable: str, metavar: str, text: str, *, default: bool | str = False) -> Any:
    """Return an option that `LATCHKEY_RECEIVER_<variable>` can also set."""
    return typer.Option(
        envvar=PREFIX + variable,
        show_envvar=False,
        metavar=metavar,
        show_default=default,
        help=text,
    )


def receiver(
    keys_url: Annotated[
        str | None,
        _option("KEYS_URL", "URL", "Endpoint with the public keys of the scanner."),
    ] = None,
    keys_file: Annotated[
        Path | None,
        _option("KEYS_FILE", "FILE", "File with public keys, in the format of the endpoint."),
    ] = None,
    action: Annotated[
        str,
        _option(
            "ACTION",
            "revoke|mark",
            "End leaked secrets, or only mark their tokens.",
            default=True,
        ),
    ] = "revoke",
    listen: Annotated[
        str, _option("LISTEN", "HOST:PORT", "Address on which it listens.", default=True)
    ] = "127.0.0.1:50090",
    target: TargetOption = "127.0.0.1:50051",
) -> None:
    """Receive reports of leaked secrets until Ctrl-C.

    The reports come in the format of GitHub's secret scanning partner program.
    GitHub's keys are at
    https://api.github.com/meta/public_keys/secret_scanning

    Under a policy, the caller needs the role 'revoker' for all accounts.

    Every option is also an environment variable: --keys-url is
    LATCHKEY_RECEIVER_KEYS_URL, and so on. Only --target differs: it is
    LATCHKEY_TARGET.
    """
    if not extra.is_installed():
        raise Failure(
            "the receiver is not installed",
            extra.INSTALL,
            Exit.UNEXPECTED,
            code="RECEIVER_NOT_INSTALLED",
        )
    access.hand_on(target)
    from latchkey_console.receiver import running, settings
    from latchkey_console.settings import SettingsError

    try:
        if action not in tuple(settings.Action):
            raise SettingsError("--action: give revoke or mark")
        running.run(
            settings.make(
                listen=listen,
                target=target,
                action=settings.Action(action),
                keys_url=keys_url,
                keys_file=keys_file,
            )
        )
    except SettingsError as error:
        raise Failure(
            str(error), "'latchkey receiver --help' shows how", Exit.USAGE, code="USAGE"
        ) from None
