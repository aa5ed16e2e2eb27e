"""The command `console`, which serves the API Tokens page.

The page is a separate package, and needs the libraries of the extra `console`. Only this module
loads it.
"""

from pathlib import Path
from typing import Annotated, Any, Final

import typer
from latchkey_console import extra

from latchkey_cli import access
from latchkey_cli.failures import Exit, Failure
from latchkey_cli.options import TargetOption

__all__ = ["console"]

PREFIX: Final = "LATCHKEY_CONSOLE_"
_SECRET_BYTES_MAX = 4_096


def _option(variable: str, metavar: str, text: str, *, default: bool | str = False) -> Any:
    """Return an option that `LATCHKEY_CONSOLE_<variable>` can also set.

    The help text states this naming rule once: the names do not fit beside the options on a
    terminal.
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
        _option("ACCOUNT", "ID", "Treat everyone as this account. For a trial, on loopback only."),
    ] = None,
    account_header: Annotated[
        str | None,
        _option(
            "ACCOUNT_HEADER",
            "NAME",
            "Header in which a sign-in proxy sends the account ID, such as jane@example.com.",
        ),
    ] = None,
    accounts_header: Annotated[
        str | None,
        _option(
            "ACCOUNTS_HEADER",
            "NAME",
            "Header in which the proxy sends all accounts of a person, separated by commas.",
        ),
    ] = None,
    groups_header: Annotated[
        str | None,
        _option(
            "GROUPS_HEADER",
            "NAME",
            "With --operator-group: header in which the proxy sends a person's groups.",
        ),
    ] = None,
    person_header: Annotated[
        str | None,
        _option(
            "PERSON_HEADER",
            "NAME",
            "Header in which the proxy sends the person's own name, for the audit log.",
            default="--account-header",
        ),
    ] = None,
    trusted_proxy: Annotated[
        list[str] | None,
        _option(
            "TRUSTED_PROXY",
            "ADDRESS",
            "Address or network that may send the header; may be repeated. In the environment "
            "variable, separate several with spaces.",
        ),
    ] = None,
    oidc_issuer: Annotated[
        str | None, _option("OIDC_ISSUER", "URL", "OpenID Connect provider to sign in with.")
    ] = None,
    oidc_client_id: Annotated[
        str | None, _option("OIDC_CLIENT_ID", "ID", "This page's client ID at the provider.")
    ] = None,
    oidc_client_secret_file: Annotated[
        Path | None,
        _option(
            "OIDC_CLIENT_SECRET_FILE",
            "FILE",
            "File with the client secret. Without it, the page relies on PKCE alone.",
        ),
    ] = None,
    oidc_claim: Annotated[
        str,
        _option(
            "OIDC_CLAIM",
            "NAME",
            "Claim that holds the account ID: at most 128 characters of A-Za-z0-9._:@|+=/~-",
            default=True,
        ),
    ] = "sub",
    oidc_accounts_claim: Annotated[
        str | None,
        _option(
            "OIDC_ACCOUNTS_CLAIM",
            "NAME",
            "Claim that lists all accounts of a person, who then switches between them.",
        ),
    ] = None,
    oidc_accounts_key: Annotated[
        str | None,
        _option(
            "OIDC_ACCOUNTS_KEY",
            "NAME",
            "If that claim is a list of objects: their key with the account ID, such as id.",
        ),
    ] = None,
    operator_group: Annotated[
        list[str] | None,
        _option(
            "OPERATOR_GROUP",
            "NAME",
            "Serve the operators' view instead, to people in this group; may be repeated. In the "
            "environment variable, separate several with spaces.",
        ),
    ] = None,
    oidc_groups_claim: Annotated[
        str,
        _option(
            "OIDC_GROUPS_CLAIM",
            "NAME",
            "With --operator-group: claim that lists a person's groups.",
            default=True,
        ),
    ] = "groups",
    listen: Annotated[
        str, _option("LISTEN", "HOST:PORT", "Address on which the page listens.", default=True)
    ] = "127.0.0.1:50080",
    public_url: Annotated[
        str | None,
        _option(
            "PUBLIC_URL",
            "URL",
            "URL that browsers use, such as https://tokens.example.com.",
            default="http:// and --listen",
        ),
    ] = None,
    product_name: Annotated[
        str,
        _option("PRODUCT_NAME", "TEXT", "Your product's name, in the page's header.", default=True),
    ] = "Latchkey",
    api_example_url: Annotated[
        str,
        _option(
            "API_EXAMPLE_URL",
            "URL",
            "Address of your API, in the examples of how to use a token.",
            default=True,
        ),
    ] = "https://api.example.com/",
    support_url: Annotated[
        str | None,
        _option("SUPPORT_URL", "URL", "Where people get help; the page then links to it."),
    ] = None,
    logo: Annotated[
        Path | None,
        _option("LOGO", "FILE", "Your logo, an SVG, PNG or WebP file, in the page's header."),
    ] = None,
    theme_css: Annotated[
        Path | None,
        _option(
            "THEME_CSS", "FILE", "Style sheet with your colours and fonts; see docs/console.md."
        ),
    ] = None,
    base_path: Annotated[
        str,
        _option(
            "BASE_PATH",
            "PATH",
            "Path below which the page is served, such as /settings/tokens.",
            default="/",
        ),
    ] = "/",
    no_header: Annotated[
        bool,
        typer.Option(
            "--no-header",
            envvar=f"{PREFIX}NO_HEADER",
            show_envvar=False,
            help="Leave out the page's header, inside a page that has one.",
        ),
    ] = False,
    frame_ancestor: Annotated[
        list[str] | None,
        _option(
            "FRAME_ANCESTOR",
            "ORIGIN",
            "Origin whose pages may frame this page, such as https://app.example.com; may be "
            "repeated.",
        ),
    ] = None,
    state_key_file: Annotated[
        Path | None,
        _option(
            "STATE_KEY_FILE",
            "FILE",
            "File with the key that several processes of the page share.",
        ),
    ] = None,
    peer: Annotated[
        list[str] | None,
        _option(
            "PEER",
            "HOST:PORT",
            "Where another process of the page listens, so that a sign-out counts there too; may "
            "be repeated. A name stands for all its addresses.",
        ),
    ] = None,
    target: TargetOption = "127.0.0.1:50051",
) -> None:
    """Serve the API Tokens web page until Ctrl-C.

    Choose how the page identifies visitors: --account to try it,
    --account-header with --trusted-proxy behind a sign-in proxy, or
    --oidc-issuer with --oidc-client-id to sign in with OpenID Connect.

    Every option is also an environment variable: --oidc-issuer is
    LATCHKEY_CONSOLE_OIDC_ISSUER, and so on. Only --target differs: it is
    LATCHKEY_TARGET.

    To run several processes behind a load balancer, give all of them the same
    --state-key-file, and each the others as --peer.

    With --operator-group, it serves the operators' view: find a token of any
    account, the audit log, and the servers. It changes nothing.
    """
    if not extra.is_installed():
        raise Failure(
            "the console is not installed",
            extra.INSTALL,
            Exit.UNEXPECTED,
            code="CONSOLE_NOT_INSTALLED",
        )
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
                accounts_header=accounts_header,
                groups_header=groups_header,
                person_header=person_header,
                trusted_proxies=tuple(trusted_proxy or ()),
                oidc_issuer=oidc_issuer,
                oidc_client_id=oidc_client_id,
                oidc_client_secret=_secret(oidc_client_secret_file),
                oidc_claim=oidc_claim,
                oidc_accounts_claim=oidc_accounts_claim,
                oidc_accounts_key=oidc_accounts_key,
                oidc_groups_claim=oidc_groups_claim,
                operator_groups=tuple(operator_group or ()),
                product_name=product_name,
                api_example_url=api_example_url,
                support_url=support_url,
                logo=logo,
                theme_css=theme_css,
                base_path=base_path,
                header=not no_header,
                frame_ancestors=tuple(frame_ancestor or ()),
                state_key_file=state_key_file,
                peers=tuple(peer or ()),
            )
        )
    except settings.SettingsError as error:
        raise Failure(
            str(error), "'latchkey console --help' shows how", Exit.USAGE, code="USAGE"
        ) from None


def _secret(path: Path | None) -> str | None:
    """Return the file's text without its trailing newline. Raises Failure."""
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            return file.read(_SECRET_BYTES_MAX).decode().rstrip("\r\n")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise Failure(
            f"cannot read --oidc-client-secret-file: {reason}",
            "check the path and its permissions",
            Exit.USAGE,
            code="USAGE",
        ) from None
