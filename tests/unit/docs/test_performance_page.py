"""docs/performance.md: its commands exist and measure what the page says that they measure."""

import re

import pytest

from tests.benchmarks import coherence, coherence_delete, hosts
from tests.benchmarks.__main__ import parsed
from tests.helpers.repository import ROOT

PAGE = (ROOT / "docs/performance.md").read_text("utf-8")
COMMANDS = sorted({c.strip('"') for c in re.findall(r'make bench ARGS=("[^"]+"|\S+?)`', PAGE)})


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the tables below a heading, without their heads."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    return [cells for cells in lines if not cells[0].startswith("---")]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_measures_something(command: str) -> None:
    """The bench accepts the arguments of each command, and a part with the title exists."""
    options = parsed(command.split())
    if options.only and not options.hosts:
        assert coherence.chosen(options.only)


def test_the_page_has_every_command() -> None:
    """The pattern above finds the commands: one for each section that names one."""
    assert {parsed(c.split()).hosts for c in COMMANDS} == {True, False}
    assert len(COMMANDS) >= 4


def test_deletions_have_a_row_for_each_measured_fleet() -> None:
    """The table of deletions has the numbers of workers and clients that the command measures."""
    found = [(int(workers), int(clients)) for workers, clients, *_ in rows("A deletion")[1:]]
    assert found == [(w, clients) for w, fleets in coherence_delete.FLEETS for clients in fleets]


def test_hosts_have_a_row_for_each_measured_case() -> None:
    """The table of hosts lists each number of workers that the command measures, and no other."""
    numbers = [
        int(cells[0].removesuffix(" workers").replace(",", ""))
        for cells in rows("What a host costs Postgres")
        if re.fullmatch(r"[\d,]+ workers", cells[0])
    ]
    assert numbers == sorted({case.verifiers for case in hosts.CASES})
