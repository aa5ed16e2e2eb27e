"""`latchkey policy`: creates a caller's credential and validates a policy file."""

import os
import sys
from pathlib import Path

from latchkey_service.access.credentials import mint, policy_digest
from latchkey_service.access.policy import PolicyError, is_name, parse
from latchkey_service.access.policy_file import read_text
from latchkey_service.settings import settings

__all__ = ["run"]

USAGE = """\
usage: latchkey policy new-caller NAME
       latchkey policy check [FILE]"""


def run(arguments: list[str]) -> int:
    """Run the command and return the exit code: 2 for a wrong setting or argument."""
    match arguments:
        case ["new-caller", name]:
            return _new_caller(name)
        case ["new-caller", *_]:
            return _not_created("new-caller takes one name")
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


def _new_caller(name: str) -> int:
    """Print a credential on stdout, and the matching policy section, as TOML, on stderr."""
    if not is_name(name):
        return _not_created("a caller name has 1-64 characters of A-Za-z0-9._-")
    credential = mint(os.urandom)
    sys.stdout.write(credential.reveal() + "\n")
    sys.stdout.flush()
    header = f'[callers."{name}"]' if "." in name else f"[callers.{name}]"
    _print(
        f"\n# The credential of {name} is on standard output and is shown only once. The policy\n"
        f"# stores its digest; a caller may have several credentials.\n{header}\n"
        f'credentials = ["{policy_digest(credential)}"]\n'
        'roles = ["verifier"]  # or manager, operator'
    )
    return 0


def _check_configured() -> int:
    """Check the file that the service would read, as set in the environment or a .env file."""
    try:
        path = settings.load(together=False).policy
    except settings.ConfigError as error:
        _print(f"latchkey: invalid settings:\n{error}")
        return 2
    if path is None:
        _print(f"latchkey: name a file, or set {settings.PREFIX}POLICY")
        return 2
    return _check(path)


def _check(path: Path) -> int:
    try:
        policy = parse(read_text(path))
    except PolicyError as error:
        _print(f"latchkey: {path}: {error}")
        return 1
    sys.stdout.write(f"{path} is valid: {len(policy.callers)} callers\n")
    return 0


def _print(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201 - output of a command
