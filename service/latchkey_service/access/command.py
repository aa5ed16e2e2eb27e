"""`latchkey policy`: creates a caller's credential and validates a policy file."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NoReturn

from latchkey_service.access.credentials import mint, policy_digest
from latchkey_service.access.methods import VERIFIER
from latchkey_service.access.policy import PolicyError, is_name, parse
from latchkey_service.access.policy_file import read_text
from latchkey_service.settings import loading
from latchkey_service.settings.settings import PREFIX

__all__ = ["run"]

USAGE = """\
usage: latchkey policy new-caller NAME [--role ROLE ...] [--account ID ...] [--output FILE]
       latchkey policy check [FILE]"""


def run(arguments: list[str]) -> int:
    """Run the command and return the exit code: 2 for a wrong setting or argument."""
    match arguments:
        case ["new-caller", *rest]:
            return _new_caller(rest)
        case ["check"]:
            return _check_configured()
        case ["check", path]:
            return _check(Path(path))
        case ["check", *_]:
            return _usage_error("check takes one file")
        case []:
            return _usage_error("expected new-caller or check")
        case _:
            # Not repeated: if the arguments are in the wrong order, it may be a credential.
            return _usage_error("the first argument must be new-caller or check")


def _usage_error(mistake: str) -> int:
    # People type `latchkey`, which starts this process. The image has a `latchkey` command too.
    _print(f"latchkey: policy: {mistake}\n{USAGE}")
    return 2


def _not_created(mistake: str) -> int:
    """Print the mistake as a TOML comment: stderr may be appended to a policy file."""
    _print(f"# latchkey: policy: {mistake}; no credential was created")
    return 2


class _Parser(argparse.ArgumentParser):
    """Raises ValueError, since errors must be TOML comments."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _new_caller(arguments: list[str]) -> int:
    """Print a credential on stdout. Append the policy section to a file, or print it on stderr."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--role", action="append", default=[])
    parser.add_argument("--account", action="append", default=[])
    parser.add_argument("--output", type=Path)
    try:
        given = parser.parse_args(arguments)
    except ValueError as error:
        return _not_created(f"new-caller: {error}")
    if len(given.names) != 1:
        return _not_created("new-caller takes one name")
    (name,) = given.names
    if not is_name(name):
        return _not_created("a caller name has 1-64 characters of A-Za-z0-9._-")
    credential = mint(os.urandom)
    roles = json.dumps(given.role or [VERIFIER])
    section = (
        f'[callers."{name}"]\n' if "." in name else f"[callers.{name}]\n"
    ) + f'credentials = ["{policy_digest(credential)}"]\nroles = {roles}'
    section += "\n" if given.role else "  # or manager, operator\n"
    if given.account:
        section += f"accounts = {json.dumps(given.account)}\n"
    try:
        # Only the file can say which further roles and callers there are.
        text = _existing(given.output)
        known = parse(text)
        if name in (*known.callers, *known.unidentified):
            return _not_created(f"{given.output} already has the caller {name}")
        policy = parse(f"{text}\n{section}")
    except PolicyError as error:
        where = "" if given.output is None else f"{given.output}: "
        return _not_created(f"{where}{error}")
    try:
        if given.output is not None:
            with given.output.open("a", encoding="utf-8") as file:
                file.write(f"\n{section}" if text else section)
    except OSError as error:
        return _not_created(f"cannot write {given.output}: {error.strerror}")
    sys.stdout.write(credential.reveal() + "\n")
    sys.stdout.flush()
    if given.output is None:
        _print(
            f"\n# The credential of {name} is on standard output and is shown only once. The "
            "policy\n# stores its digest; a caller may have several credentials.\n"
            f"{section.rstrip()}"
        )
    else:
        callers = len(policy.callers)
        _print(
            f"{given.output} now has the caller {name} ({callers} in all). Its credential is on "
            "standard output and is shown only once."
        )
    return 0


def _existing(path: Path | None) -> str:
    """Return the text of a policy file, or "" if there is none. Raises PolicyError."""
    return "" if path is None or not path.exists() else read_text(path)


def _check_configured() -> int:
    """Check the file that the service would read, as set in the environment or a .env file."""
    try:
        path = loading.load(together=False).policy
    except loading.ConfigError as error:
        _print(f"latchkey: invalid settings:\n{error}")
        return 2
    if path is None:
        _print(f"latchkey: name a file, or set {PREFIX}POLICY")
        return 2
    return _check(path)


def _check(path: Path) -> int:
    try:
        policy = parse(read_text(path))
    except PolicyError as error:
        _print(f"latchkey: {path}: {error}")
        return 1
    if policy.unidentified:
        for name in policy.unidentified:
            _print(
                f"latchkey: {path}: the caller {name} has neither credentials nor certificates, so "
                "no call can be from it"
            )
        return 1
    sys.stdout.write(f"{path} is valid: {len(policy.callers)} callers\n")
    return 0


def _print(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201 - output of a command
