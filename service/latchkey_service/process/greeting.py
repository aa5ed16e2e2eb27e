"""The lines that the service prints when it serves, with calls that work as it is configured."""

import os
import shlex
import sys
from pathlib import Path
from typing import Final

from latchkey_service.settings import exposure
from latchkey_service.settings.settings import Settings

__all__ = ["welcome"]

# The command line's own default, which the example then need not repeat.
_DEFAULT_TARGET: Final = "127.0.0.1:50051"
_WILDCARDS: Final = ("0.0.0.0", "[::]")  # noqa: S104 - recognised, not listened on


def welcome(settings: Settings, listen: str, tls_listen: str | None, database: str) -> str:
    """Return the text. `listen` and `tls_listen` are the addresses in use."""
    workers = f"{settings.workers} worker{'' if settings.workers == 1 else 's'}"
    serves = f"Latchkey serves on {listen} ({workers}, {database}). Press Ctrl-C to stop."
    lines = ["", serves]
    if tls_listen is not None:
        lines.append(f"With TLS it serves on {tls_listen}.")
    if settings.policy is not None:
        policy = shlex.quote(str(settings.policy))
        command = f"{_latchkey()} policy new-caller me --role manager --output {policy}"
        lines += [
            f"Only the callers in {settings.policy} may call. To add one that manages tokens:",
            f"  (umask 077; {command} >me.credential)",
        ]
    lines += ["", "Create a token, in another terminal:", _command_line(settings, listen)]
    if exposure.reflects(settings, settings.listen):
        lines += ["", "The same with grpcurl:", *_grpcurl(settings, listen)]
    return "\n".join([*lines, ""])


def _latchkey() -> str:
    """Return the command line beside this Python, as one types it here."""
    path = Path(sys.executable).parent / "latchkey"
    if not os.access(path, os.X_OK):
        return "latchkey"
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _command_line(settings: Settings, listen: str) -> str:
    target = _reachable(listen)
    words = [_latchkey(), "create", "first", "--scope", "read", "-a", "acme"]
    if target != _DEFAULT_TARGET:
        words += ["--target", target]
    if settings.policy is not None:
        words += ["--credential-file", "me.credential"]
    return "  " + shlex.join(words)


def _grpcurl(settings: Settings, listen: str) -> list[str]:
    address = _reachable(listen)
    if address.startswith("unix:"):
        address = "-unix " + address.removeprefix("unix:")
    who = ""
    if settings.policy is not None:
        who = """-H "authorization: Bearer $(cat me.credential)" """
    request = """'{"account_id": "acme", "name": "second", "scope": "SCOPE_READ"}'"""
    return [
        f"  grpcurl -plaintext {who}-d {request} \\",
        f"    {address} latchkey.v1.TokenService/Create",
    ]


def _reachable(listen: str) -> str:
    """Return an address at which this machine reaches the listener."""
    host, separator, port = listen.rpartition(":")
    return f"127.0.0.1{separator}{port}" if host in _WILDCARDS else listen
