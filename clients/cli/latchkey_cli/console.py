"""The command that shows the page for people: `console`.

The page is another package, whose libraries need not be installed; it is loaded only here.
"""

import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer

from latchkey_cli import access
from latchkey_cli.failures import Exit, Failure
from latchkey_cli.options import TargetOption

__all__ = ["console"]

_NEEDED = (
    "authlib",
    "httpx2",
    "itsdangerous",
    "jinja2",
    "latchkey_console",
    "starlette",
    "uvicorn",
)
_SECRET_BYTES_MAX = 4_096


def console(
    account: Annotated[
        str | None,
        typer.Option(
            envvar="LATCHKEY_CONSOLE_ACCOUNT",
            metavar="ID",
            show_default=False,
            help="Everyone is this account: for trying it, on loopback only.",
        ),
    ] = None,
    account_header: Annotated[
        str | None,
        typer.Option(
            envvar="LATCHKEY_CONSOLE_ACCOUNT_HEADER",
            metavar="NAME",
            show_default=False,
            help="Header in which a sign-in proxy gives the account.",
        ),
    ] = None,
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(
            envvar="LATCHKEY_CONSOLE_TRUSTED_PROXY",
            metavar="ADDRESS",
            show_default=False,
            help="Address or network that the header may come from; may be repeated.",
        ),
    ] = None,
    oidc_issuer: Annotated[
        str | None,
        typer.Option(
            envvar="LATCHKEY_CONSOLE_OIDC_ISSUER",
            metavar="URL",
            show_default=False,
            help="OpenID Connect provider to sign in with.",
        ),
    ] = None,
    oidc_client_id: Annotated[
        str | None,
        typer.Option(
            envvar="LATCHKEY_CONSOLE_OIDC_CLIENT_ID",
            metavar="ID",
            show_default=False,
            help="What the provider calls this page.",
        ),
    ] = None,
    oidc_client_secret_file: Annotated[
        Path | None,
        typer.Option(
            envvar="LATCHKEY_CONSOLE_OIDC_CLIENT_SECRET_FILE",
            metavar="FILE",
            show_default=False,
            help="File with the client secret; without one, PKCE alone.",
        ),
    ] = None,
    oidc_claim: Annotated[
        str,
        typer.Option(
            envvar="LATCHKEY_CONSOLE_OIDC_CLAIM", metavar="NAME", help="Claim that is the account."
        ),
    ] = "sub",
    listen: Annotated[
        str,
        typer.Option(
            envvar="LATCHKEY_CONSOLE_LISTEN", metavar="HOST:PORT", help="Where the page listens."
        ),
    ] = "127.0.0.1:50080",
    public_url: Annotated[
        str | None,
        typer.Option(
            envvar="LATCHKEY_CONSOLE_PUBLIC_URL",
            metavar="URL",
            show_default="http:// and --listen",
            help="How browsers reach it, such as https://tokens.example.com.",
        ),
    ] = None,
    target: TargetOption = "127.0.0.1:50051",
) -> None:
    """Serve the API Tokens page, for people, until Ctrl-C.

    Say who is looking: --account to try it, --account-header with
    --trusted-proxy behind a sign-in proxy, or --oidc-issuer with
    --oidc-client-id to sign in with OpenID Connect.

    It keeps open forms and sign-ins in memory: run one process of it.
    """
    if any(importlib.util.find_spec(name) is None for name in _NEEDED):
        raise Failure(
            "the page is not installed here",
            "install it from a clone of Latchkey with: pip install '.[cli,console]'",
            Exit.UNEXPECTED,
            code="CONSOLE_NOT_INSTALLED",
        )
    # Before grpc is loaded: its core writes lines of its own to standard error.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")

    access.hand_on(target)
    from latchkey_console import running, settings

    try:
        running.run(
            settings.make(
                listen=listen,
                public_url=public_url,
                target=target,
                account=account,
                account_header=account_header,
                trusted_proxies=tuple(trusted_proxy or ()),
                oidc_issuer=oidc_issuer,
                oidc_client_id=oidc_client_id,
                oidc_client_secret=_secret(oidc_client_secret_file),
                oidc_claim=oidc_claim,
            )
        )
    except settings.SettingsError as error:
        raise Failure(
            str(error), "'latchkey console --help' shows how", Exit.USAGE, code="USAGE"
        ) from None


def _secret(path: Path | None) -> str | None:
    """Return what a file holds, without the newline at its end."""
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            return file.read(_SECRET_BYTES_MAX).decode().rstrip("\r\n")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise Failure(
            f"--oidc-client-secret-file cannot be read: {reason}",
            "check the path and its permissions",
            Exit.USAGE,
            code="USAGE",
        ) from None
