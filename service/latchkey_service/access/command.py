"""What people do about the policy file: a new caller's credential, and whether a file is right."""

import os
import sys
from pathlib import Path

from latchkey_service.access.credentials import mint, policy_digest
from latchkey_service.access.policy import PolicyError, is_name, parse
from latchkey_service.access.policy_file import read_text
from latchkey_service.config import PREFIX

__all__ = ["run"]


def run(arguments: list[str]) -> int | None:
    """Do what the arguments say and return the exit code, or None if they say nothing of use."""
    match arguments:
        case ["new-caller", name]:
            return _new_caller(name)
        case ["check"]:
            path = os.environ.get(PREFIX + "POLICY", "")
            if not path:
                _tell(f"latchkey: give a file, or set {PREFIX}POLICY")
                return 2
            return _check(Path(path))
        case ["check", path]:
            return _check(Path(path))
        case _:
            return None


def _new_caller(name: str) -> int:
    """Print a credential, alone on standard output, and beside it, as TOML, the policy's part."""
    if not is_name(name):
        _tell("latchkey: a caller's name has 1-64 characters of A-Za-z0-9._-")
        return 2
    credential = mint(os.urandom)
    sys.stdout.write(credential.reveal() + "\n")
    sys.stdout.flush()
    header = f'[callers."{name}"]' if "." in name else f"[callers.{name}]"
    _tell(
        f"\n# The credential of {name} is on standard output, shown this once. The policy has its\n"
        f"# digest; a caller may have several.\n{header}\n"
        f'credentials = ["{policy_digest(credential)}"]\n'
        'roles = ["verifier"]  # or manager, operator'
    )
    return 0


def _check(path: Path) -> int:
    try:
        policy = parse(read_text(path))
    except PolicyError as error:
        _tell(f"latchkey: {path}: {error}")
        return 1
    sys.stdout.write(f"{path} is right: {len(policy.callers)} callers\n")
    return 0


def _tell(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201 - for a person
