"""The command that shows the page for people: `console`.

The page is another package, whose libraries need not be installed; it is loaded only here.
"""

import importlib.util
import os
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from latchkey_cli import access
from latchkey_cli.failures import Exit, Failure
from latchkey_cli.options import TargetOption

__all__ = ["console"]

PREFIX: Final = "LATCHKEY_CONSOLE_"
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


def _option(variable: str, metavar: str, text: str, *, default: bool | str = False) -> Any:
    """Return an option that is an environment variable too: its own name after the prefix.

    The names do not fit beside the options on a terminal, and are told as a rule.
    """
    return typer.Option(
        envvar=PREFIX + variable,
        show_envvar=False,
        metavar=metavar,
        show_default=default,
        help=text,
    )


def console(
    account: Annotated[
        str | None,
        _option("ACCOUNT", "ID", "Everyone is this account: for trying it, on loopback only."),
    ] = None,
    account_header: Annotated[
        str | None,
        _option("ACCOUNT_HEADER", "NAME", "Header in which a sign-in proxy gives the account."),
    ] = None,
    trusted_proxy: Annotated[
        list[str] | None,
        _option(
            "TRUSTED_PROXY",
            "ADDRESS",
            "Address or network that the header may come from; may be repeated. In the variable, "
            "spaces separate several.",
        ),
    ] = None,
    oidc_issuer: Annotated[
        str | None, _option("OIDC_ISSUER", "URL", "OpenID Connect provider to sign in with.")
    ] = None,
    oidc_client_id: Annotated[
        str | None, _option("OIDC_CLIENT_ID", "ID", "What the provider calls this page.")
    ] = None,
    oidc_client_secret_file: Annotated[
        Path | None,
        _option(
            "OIDC_CLIENT_SECRET_FILE",
            "FILE",
            "File with the client secret; without one, PKCE alone.",
        ),
    ] = None,
    oidc_claim: Annotated[
        str, _option("OIDC_CLAIM", "NAME", "Claim that is the account.", default=True)
    ] = "sub",
    listen: Annotated[
        str, _option("LISTEN", "HOST:PORT", "Where the page listens.", default=True)
    ] = "127.0.0.1:50080",
    public_url: Annotated[
        str | None,
        _option(
            "PUBLIC_URL",
            "URL",
            "How browsers reach it, such as https://tokens.example.com.",
            default="http:// and --listen",
        ),
    ] = None,
    target: TargetOption = "127.0.0.1:50051",
) -> None:
    """Serve the API Tokens page, for people, until Ctrl-C.

    Say who is looking: --account to try it, --account-header with
    --trusted-proxy behind a sign-in proxy, or --oidc-issuer with
    --oidc-client-id to sign in with OpenID Connect.

    Each option is an environment variable too: --oidc-issuer is
    LATCHKEY_CONSOLE_OIDC_ISSUER, and so on; --target alone is LATCHKEY_TARGET.

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
