"""Access options, given before or after the command: the caller's credentials and the CAs to trust.

They override the environment variables that every Latchkey client reads (`latchkey.access`). No
option takes a credential itself, because everyone on the machine can read a process's arguments.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latchkey_cli.failures import Exit, Failure

if TYPE_CHECKING:
    # Types only: shell completion must not wait for gRPC to load.
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


def _option(name: str, text: str) -> Any:
    return typer.Option(
        name, metavar="FILE", show_default=False, rich_help_panel="Access", help=text
    )


CaOption = Annotated[
    Path | None,
    _option(
        "--tls-ca", "Use TLS and trust these CAs, or 'system' for the system's. LATCHKEY_TLS_CA"
    ),
]
CertificateOption = Annotated[
    Path | None,
    _option("--tls-certificate", "Your client certificate. LATCHKEY_TLS_CERTIFICATE"),
]
KeyOption = Annotated[Path | None, _option("--tls-key", "Its private key. LATCHKEY_TLS_KEY")]
CredentialFileOption = Annotated[
    Path | None,
    _option(
        "--credential-file",
        "Your credential. LATCHKEY_CREDENTIAL_FILE, or LATCHKEY_CREDENTIAL itself",
    ),
]

# A global is enough: each process runs one command.
_options: "dict[str, Path | None]" = {}


def choose(
    tls_ca: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    credential_file: Path | None,
) -> None:
    """Store the access options, for `chosen` and `hand_on`."""
    _options.update(
        tls_ca=tls_ca,
        tls_certificate=tls_certificate,
        tls_key=tls_key,
        credential_file=credential_file,
    )


def chosen() -> "Access":
    """Return the access settings from the options and the environment. Raises Failure."""
    from latchkey import Access, AccessError

    try:
        return Access.from_environment(os.environ, **_options)
    except AccessError as error:
        failure = of_no_use(str(error))
    raise failure


def hand_on(target: str) -> None:
    """Copy the access options into the environment, where the console reads them.

    Raises Failure if the settings are invalid or do not fit `target`.
    """
    from latchkey import AccessError

    try:
        chosen().check_target(target)
    except AccessError as error:
        raise of_no_use(str(error)) from None
    given = {name: str(path) for name, path in _options.items() if path is not None}
    if "credential_file" in given:
        os.environ.pop("LATCHKEY_CREDENTIAL", None)
    # An empty variable counts as unset.
    if "tls_certificate" in given and not os.environ.get("LATCHKEY_TLS_CA"):
        os.environ["LATCHKEY_TLS_CA"] = "system"
    os.environ.update({f"LATCHKEY_{name.upper()}": value for name, value in given.items()})


def of_no_use(text: str) -> Failure:
    """Return the failure for an AccessError, a problem with TLS files or a credential."""
    return Failure(text, "'latchkey --help' lists the access options", Exit.USAGE, code="ACCESS")
