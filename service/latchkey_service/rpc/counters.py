"""Counters of calls and verdicts, where a log line per event would cost too much."""

from collections import Counter

from latchkey_service.tokens.verdict import Verdict

__all__ = ["Counts"]


class Counts:
    """Counters since the last summary. Event loop only."""

    def __init__(self) -> None:
        self.verdicts: Counter[Verdict] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()

    def take(self) -> dict[str, int]:
        """Return the counts by name and reset them."""
        summary = {f"verdict.{v.name}": n for v, n in sorted(self.verdicts.items())}
        summary |= {f"{method}.{code}": n for (method, code), n in sorted(self.calls.items())}
        self.verdicts.clear()
        self.calls.clear()
        return summary
