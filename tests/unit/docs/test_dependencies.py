"""docs/dependencies.md lists what is pinned, with the versions in the files."""

import re
import tomllib
from datetime import UTC, date, datetime

from tests.checks.distributions import distributions
from tests.helpers.repository import ROOT

PAGE = (ROOT / "docs/dependencies.md").read_text("utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if re.match(r"\| `", line)
]
PIN = re.compile(r"([a-z0-9-]+)(?:\[[^]]*\])?==([0-9][^;\s]*)")


def pinned() -> dict[str, str]:
    """Return the version of each package that a file pins."""
    texts = (ROOT / "requirements/pins.in").read_text("utf-8").splitlines()
    texts += tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["dependency-groups"]["dev"]
    for one in distributions(ROOT):
        texts += [*one.dependencies, *(text for extra in one.extras.values() for text in extra)]
    found = {match[1]: match[2] for text in texts if (match := PIN.match(text))}
    return {name: one for name, one in found.items() if not name.startswith("latchkey-")}


def test_every_pin_is_on_the_page() -> None:
    """Each exact version in a file is in the table, and the table has no other exact version."""
    listed = {
        name: row[1]
        for row in ROWS
        for name in re.findall(r"`([^`]+)`", row[0])
        if re.fullmatch(r"[0-9.]+", row[1])
    }
    assert len(listed) >= 7
    assert listed == pinned()


def test_every_row_has_a_reason_and_a_date() -> None:
    """Each row says why, and when somebody last looked, which is not in the future."""
    for row in ROWS:
        assert row[3], row
        assert date.fromisoformat(row[4]) <= datetime.now(UTC).date(), row
