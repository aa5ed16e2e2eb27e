"""The rate limit of a token, as a value and as text."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

_PERIODS: Final[Mapping[str, timedelta]] = {
    "second": timedelta(seconds=1),
    "minute": timedelta(minutes=1),
    "hour": timedelta(hours=1),
}
_RATE: Final = re.compile(
    rf"([0-9]{{1,7}})/({'|'.join(_PERIODS)})(?:,? burst ([0-9]{{1,7}}))?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class RateLimit:
    """How often a token may be used: `count` times in `period` on average, `burst` times at once.

    `period` is a second, a minute or an hour. A `burst` of 0 stands for `count`. As text, it is
    "100/minute" or "100/minute, burst 20".
    """

    count: int
    period: timedelta
    burst: int = 0

    @classmethod
    def parse(cls, text: str) -> "RateLimit":
        """Return the limit for a text such as "100/minute, burst 20". Raises ValueError."""
        match = _RATE.fullmatch(text.strip())
        if match is None:
            raise ValueError("a rate limit has the form 100/minute, or 100/minute, burst 20")
        count, period, burst = match.groups()
        return cls(int(count), _PERIODS[period], int(burst or 0))

    def __str__(self) -> str:
        """Return the limit as text."""
        names = {period: name for name, period in _PERIODS.items()}
        text = f"{self.count}/{names.get(self.period, self.period)}"
        return text if self.burst in (0, self.count) else f"{text}, burst {self.burst}"
