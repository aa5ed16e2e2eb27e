"""The inputs and the results of the coherence parts: figures, some with a bound."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.benchmarks.processes import Cores, Server
from tests.benchmarks.report import Target
from tests.benchmarks.seed import Seeded

__all__ = ["Bench", "Figure", "percentile"]


@dataclass(frozen=True, slots=True)
class Bench:
    """The environment of the measurements. `servers` contains `native`, which caches, and
    `reading`, which does not, both on the database `usual`; parts that need others start them."""

    scratch: Path
    pepper_file: Path
    cores: Cores
    postmaster: int
    seeded: Mapping[str, Seeded]
    servers: Mapping[str, Server]
    # All secrets of the database `large`, one a line.
    secrets_file: Path
    quick: bool
    # The time.monotonic() after which nothing new begins.
    give_up: float

    @property
    def rounds(self) -> int:
        """Return the number of rounds of slices that are compared with each other."""
        return 3 if self.quick else 9

    @property
    def slice_seconds(self) -> float:
        """Return the length of a slice."""
        return 0.4 if self.quick else 1.0

    def settings(self, database: str, **more: object) -> dict[str, str]:
        """Return the settings of a server on one of the databases."""
        usual = {"DATABASE_URL": self.seeded[database].url, "PEPPER_FILE": str(self.pepper_file)}
        return usual | {key: str(value) for key, value in more.items()}


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure with its range over the rounds, and its total number of samples."""

    name: str
    unit: str
    value: float
    low: float
    high: float
    samples: int
    at_least: float | None = None
    at_most: float | None = None

    @classmethod
    def median(
        cls,
        name: str,
        unit: str,
        rounds: Sequence[float],
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> Self:
        """Return the median over the rounds."""
        middle = statistics.median(rounds)
        return cls(
            *(name, unit, middle, min(rounds), max(rounds), len(rounds)),
            at_least=at_least,
            at_most=at_most,
        )

    @classmethod
    def percentile(
        cls,
        name: str,
        unit: str,
        samples: Sequence[float],
        share: float,
        *,
        at_most: float | None = None,
    ) -> Self:
        """Return a percentile of all samples; the range is that of their fifths, in order."""
        step = max(1, len(samples) // 5)
        fifths = [samples[n : n + step] for n in range(0, len(samples) - step + 1, step)]
        of_fifths = [percentile(fifth, share) for fifth in fifths]
        whole = percentile(samples, share)
        return cls(
            *(name, unit, whole, min(of_fifths), max(of_fifths), len(samples)), at_most=at_most
        )

    def target(self) -> Target | None:
        """Return it as a target, if there is a bound."""
        if self.at_least is None and self.at_most is None:
            return None
        name = f"{self.name}, {self.unit}"
        return Target(name, self.value, self.low, self.high, self.at_least, self.at_most)

    def document(self) -> dict[str, Any]:
        """Return it for the file."""
        return {
            "name": self.name,
            "unit": self.unit,
            "value": round(self.value, 3),
            "range": [round(self.low, 3), round(self.high, 3)],
            "samples": self.samples,
        }


def percentile(samples: Sequence[float], share: float) -> float:
    """Return the value below which `share` (0 to 1) of the samples lie."""
    return sorted(samples)[min(len(samples) - 1, int(len(samples) * share))]
