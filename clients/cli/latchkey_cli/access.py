"""How the tool says who calls, and how it knows the service: options before the command.

They come before the environment (`latchkey.access`), which every client of Latchkey heeds. There is
no option for a credential itself: arguments are seen by everyone on the machine.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from latchkey_cli.failures import Exit, Failure

if TYPE_CHECKING:
    # For types alone: completing a word on the command line does not wait for gRPC.
    from latchkey import Access

__all__ = [
    "CaOption",
    "CertificateOption",
    "CredentialFileOption",
    "KeyOption",
    "choose",
    "chosen",
    "hand_on",
]

_PANEL: Final = "Access"

CaOption = Annotated[
    Path | None,
    typer.Option(
        "--tls-ca",
        metavar="FILE",
        show_default=False,
        rich_help_panel=_PANEL,
        help="Use TLS, and trust these CAs; 'system': the usual ones. LATCHKEY_TLS_CA",
    ),
]
CertificateOption = Annotated[
    Path | None,
    typer.Option(
        "--tls-certificate",
        metavar="FILE",
        show_default=False,
        rich_help_panel=_PANEL,
        help="Your client certificate. LATCHKEY_TLS_CERTIFICATE",
    ),
]
KeyOption = Annotated[
    Path | None,
    typer.Option(
        "--tls-key",
        metavar="FILE",
        show_default=False,
        rich_help_panel=_PANEL,
        help="Its private key. LATCHKEY_TLS_KEY",
    ),
]
CredentialFileOption = Annotated[
    Path | None,
    typer.Option(
        "--credential-file",
        metavar="FILE",
        show_default=False,
        rich_help_panel=_PANEL,
        help="Your credential. LATCHKEY_CREDENTIAL_FILE, or LATCHKEY_CREDENTIAL itself",
    ),
]

# The process is one command.
_options: "dict[str, Path | None]" = {}


def choose(
    tls_ca: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    credential_file: Path | None,
) -> None:
    """Keep what was said before the command."""
    _options.update(
        tls_ca=tls_ca,
        tls_certificate=tls_certificate,
        tls_key=tls_key,
        credential_file=credential_file,
    )


def chosen() -> "Access":
    """Return what to connect with. Raises Failure."""
    from latchkey import Access, AccessError

    try:
        return Access.from_environment(os.environ, **_options)
    except AccessError as error:
        failure = of_no_use(str(error))
    raise failure


def hand_on(target: str) -> None:
    """Put what was said before the command where another part of this process looks for it.

    Raises Failure for what is of no use, for `target` either.
    """
    from latchkey import AccessError

    try:
        chosen().check_target(target)
    except AccessError as error:
        raise of_no_use(str(error)) from None
    given = {name: str(path) for name, path in _options.items() if path is not None}
    if "credential_file" in given:
        os.environ.pop("LATCHKEY_CREDENTIAL", None)
    # An empty one says nothing.
    if "tls_certificate" in given and not os.environ.get("LATCHKEY_TLS_CA"):
        os.environ["LATCHKEY_TLS_CA"] = "system"
    os.environ.update({f"LATCHKEY_{name.upper()}": value for name, value in given.items()})


def of_no_use(text: str) -> Failure:
    """Return the failure for what the client library says of TLS files or a credential."""
    return Failure(text, "'latchkey --help' has the options for access", Exit.USAGE, code="ACCESS")
