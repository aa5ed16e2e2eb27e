"""The benefit and the cost of coherence: cached answers, deletions, clients that watch.

A separate part besides the table of calls, in the same run and on the same databases, because most
of it does not call a single server. Compared values are measured in turns within each round.
"""

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from tests.benchmarks import coherence_calls, coherence_delete, coherence_memory
from tests.benchmarks.coherence_delete import DELETES_MAX
from tests.benchmarks.coherence_figures import Bench, Figure
from tests.benchmarks.report import Target

__all__ = [
    "DELETES_MAX",
    "SECONDS_MAX",
    "Bench",
    "Figure",
    "chosen",
    "lines",
    "measure",
    "targets",
]

# The share of the run that this part may take.
SECONDS_MAX = 330.0
Part = Callable[[Bench], Iterator[Figure]]
# By the titles that `--only` matches.
PARTS: dict[str, Part] = {
    "verify_nowait in process": coherence_memory.in_process,
    "Verify during a flood of garbage": coherence_calls.flood,
    "client misses": coherence_calls.misses,
    "Delete": coherence_delete.deletes,
    "clients that watch": coherence_delete.idle,
    "memory per entry": coherence_memory.entries,
}


def chosen(only: str) -> list[str]:
    """Return the titles of the parts that `--only` selects."""
    return [title for title in PARTS if only in title]


def measure(bench: Bench, titles: Sequence[str]) -> list[Figure]:
    """Measure these parts one after another; skip parts that do not fit into the remaining time.

    Raises SystemExit if an answer was wrong.
    """
    figures: list[Figure] = []
    # Modules that the run has loaded do not belong to the client library, part of which is measured
    # here.
    gc.collect()
    gc.freeze()
    for title in titles:
        if time.monotonic() > bench.give_up:
            _say(f"Out of time: not measured: {title}")
            continue
        began = time.monotonic()
        try:
            figures += PARTS[title](bench)
        except (RuntimeError, OSError) as error:
            raise SystemExit(f"{title}: {error}") from error
        _say(f"{title}: {time.monotonic() - began:.0f} s")
    return figures


def targets(figures: Sequence[Figure]) -> list[Target]:
    """Return the figures with bounds."""
    return [target for figure in figures if (target := figure.target()) is not None]


def lines(figures: Sequence[Figure]) -> Iterator[str]:
    """Yield the lines of this part's table."""
    if not figures:
        return
    form = "{:<78} {:>10} {:>19}  {:<9} {:>7}"
    yield form.format("coherence", "median", "range", "unit", "samples")
    for figure in figures:
        yield form.format(
            figure.name,
            _short(figure.value),
            f"{_short(figure.low)}–{_short(figure.high)}",
            figure.unit,
            figure.samples,
        )
    yield "Medians and ranges of the rounds; p50 and p99 of all samples, ranges of their fifths."
    yield "Clients: over all workers. Deletes: all of them, and Postgres, on the same two cores."


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
