"""What people do about the policy file: a new caller's credential, and whether a file is right."""

import os
import sys
from pathlib import Path

from latchkey_service import config
from latchkey_service.access.credentials import mint, policy_digest
from latchkey_service.access.policy import PolicyError, is_name, parse
from latchkey_service.access.policy_file import read_text

__all__ = ["run"]

USAGE = """\
usage: latchkey policy new-caller NAME
       latchkey policy check [FILE]"""


def run(arguments: list[str]) -> int:
    """Do what the arguments say and return the exit code: 2 for a wrong setting or argument."""
    match arguments:
        case ["new-caller", name]:
            return _new_caller(name)
        case ["new-caller", *_]:
            return _not_made("new-caller takes one name")
        case ["check"]:
            return _check_set()
        case ["check", path]:
            return _check(Path(path))
        case ["check", *_]:
            return _wrong("check takes one file")
        case []:
            return _wrong("say new-caller or check")
        case _:
            # It is not repeated: who has mixed up the arguments may have given a credential.
            return _wrong("the first argument is neither new-caller nor check")


def _wrong(mistake: str) -> int:
    # `latchkey` is what people type, which becomes this process; in the image it is there as well.
    _tell(f"latchkey: policy: {mistake}\n{USAGE}")
    return 2


def _not_made(mistake: str) -> int:
    """Say so where the policy's part would be, which may be the end of a policy file: as TOML."""
    _tell(f"# latchkey: policy: {mistake}; nothing was made")
    return 2


def _new_caller(name: str) -> int:
    """Print a credential, alone on standard output, and beside it, as TOML, the policy's part."""
    if not is_name(name):
        return _not_made("a caller's name has 1-64 characters of A-Za-z0-9._-")
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


def _check_set() -> int:
    """Check the file that the service would read: the environment's, or that of a .env file."""
    try:
        path = config.load(together=False).policy
    except config.ConfigError as error:
        _tell(f"latchkey: these settings are wrong:\n{error}")
        return 2
    if path is None:
        _tell(f"latchkey: give a file, or set {config.PREFIX}POLICY")
        return 2
    return _check(path)


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
