"""Finds misspelled settings. Otherwise a policy could be ignored without notice. Pure."""

import difflib
import re
from collections.abc import Iterable

__all__ = ["misspelled"]

# A name that differs from a setting's by at most this many letters counts as misspelled.
MISSPELLED_MAX = 2
# Kubernetes sets these variables for each service whose name begins with "latchkey-".
_OF_KUBERNETES = re.compile(r".*_(PORT|SERVICE_HOST|SERVICE_PORT(_.*)?|PORT_\d+_(TCP|UDP)(_.*)?)")


def misspelled(prefix: str, fields: Iterable[str], names: Iterable[str]) -> list[str]:
    """Describe each of `names` that misspells a setting: `prefix` and one of `fields`.

    Other names with the prefix may belong to the command line, the console or the deployment.
    """
    settings = [name.upper() for name in fields]
    found = []
    for name in dict.fromkeys(names):
        given = name.upper().removeprefix(prefix)
        if given == name.upper() or given in settings or _OF_KUBERNETES.fullmatch(name.upper()):
            continue
        if meant := [each for each in settings if _mistakes(given, each) <= MISSPELLED_MAX]:
            found.append(f"{name}: unknown setting; did you mean {prefix}{meant[0]}?")
    return found


def _mistakes(given: str, meant: str) -> int:
    """Return the approximate number of differing letters; a moved letter counts twice."""
    blocks = difflib.SequenceMatcher(None, given, meant, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in blocks if kind != "equal")
