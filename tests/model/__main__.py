"""Prints the results of the exploration, or the steps by which a broken rule violates a promise."""

import sys

from tests.model.broken import BROKEN, HARMLESS, KEPT, LONG
from tests.model.explore import Exploration, explore
from tests.model.server_state import LEMMA


def main(wanted: list[str]) -> None:
    """Print a line for each model, or the traces of those whose name contains a word of `wanted`.

    Exits with the steps if a model that follows its rules breaks a promise.
    """
    for kept in (*KEPT, *LONG):
        if not wanted:
            found = explore(kept.model)
            _line(kept.name, found, "")
            if found.trace:
                sys.exit(found.trace)
    for broken in (*BROKEN, *HARMLESS):
        if not wanted or any(word in broken.name for word in wanted):
            found = explore(broken.model, but=[LEMMA])
            _line(broken.name, found, f"in {found.steps}" if found.violation else "no harm")
            if wanted and found.trace:
                sys.stdout.write(f"{found.trace}\n\n")


def _line(name: str, found: Exploration, outcome: str) -> None:
    line = f"{name:<66} {found.states:>9,} states {found.seconds:>6.2f} s  {outcome}"
    sys.stdout.write(f"{line.rstrip()}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
