"""A short run of each target of `make fuzz`, and that it finds what is there to be found.

Each runs as a process of its own, which libFuzzer ends by itself: the one way to have it stop.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import campaign
from tests.fuzz.surroundings import surroundings
from tests.fuzz.target import TARGETS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris is there for CPython 3.11-3.13 on Linux, x86-64, only",
)
SECONDS = 5
SEED = 20_261_124
# What each takes at least, the corpus among it: a hundredth of what it does on an idle machine, and
# less than it does with others on both cores.
INPUTS_MIN = {
    "secrets": 500,
    "page-tokens": 1_000,
    "policy": 60,
    "headers": 500,
    "lenient": 2_000,
    "messages-native": 50,
    "messages-grpcio": 50,
    "http2-native": 20,
    "http2-grpcio": 20,
    "http2-tls": 20,
}
# After the warm-up, of the process under attack. libFuzzer keeps what it finds in memory, some
# megabytes; and a server's allocator keeps what the largest burst took, which may come at any time:
# with grpcio, where a connection may have any number of streams, that is much.
GROWTH_MB_MAX = {"nothing": 24, "postgres": 64, "native": 64, "grpcio": 512, "tls": 512}


@pytest.fixture
def folder() -> Path:
    """A folder below build, where the findings of a run that failed stay."""
    path = ROOT / "build" / "fuzz-test"
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_found(name: str, folder: Path) -> None:
    """Some seconds of made-up input break no promise of a target's, and cost it no memory."""
    shutil.rmtree(folder / name, ignore_errors=True)
    with surroundings(TARGETS[name].needs) as variables:
        result = campaign.run(name, SECONDS, folder / name, variables, seed=SEED)
    assert result.ok, f"{result.findings} {result.broken}: {result.output[-4_000:]}"
    assert result.inputs >= INPUTS_MIN[name]
    assert result.rss_start > 0, "it was measured"
    growth = result.rss_end - result.rss_start
    assert growth <= GROWTH_MB_MAX[TARGETS[name].needs], f"{growth:.0f} MB more"


def test_what_is_broken_is_found(tmp_path: Path) -> None:
    """A parser that fails at two bytes in a row is found; the run fails and leaves the input, which
    fails again by the command that the run has told."""
    told = fuzz("--only", "broken", "--minutes", "0.5", "--seed", "1", "--folder", tmp_path)
    assert told.returncode == 1, told.stdout
    (finding,) = (tmp_path / "broken" / "findings").iterdir()
    assert b"\xff\x00" in finding.read_bytes()
    assert "LookupError: the parser met what it does not know" in told.stdout
    command = re.search(r'make fuzz ARGS="--replay (\S+)"', told.stdout)
    assert command is not None
    again = fuzz("--replay", command[1])
    assert again.returncode == 1
    assert "LookupError" in again.stdout
    finding.write_bytes(b"\xff\x01")
    assert fuzz("--replay", command[1]).returncode == 0


def test_a_corpus_is_kept_small(tmp_path: Path) -> None:
    """What is kept goes the same ways in as few inputs as will do, and findings of old stay."""
    kept = tmp_path / "kept"
    kept.mkdir()
    old = kept / "found-once"
    old.write_bytes(b"\0\x0a\x02\xff\xfe")
    for number in range(100):
        (kept / f"more of the same {number}").write_bytes(b"\0\x0a\x02ab" + b"\x10\x01" * number)
    before, after = campaign.keep("lenient", tmp_path / "work", {}, kept)
    assert before == 100
    assert 1 <= after <= 10
    assert len(list(kept.iterdir())) == after + 1
    assert old.exists()


def test_each_corpus_is_small_and_of_a_target() -> None:
    """The repository has no more than it needs to begin from."""
    modules = {entry.module for entry in TARGETS.values()}
    for corpus in campaign.CORPUS.iterdir():
        assert corpus.name in modules
        files = list(corpus.iterdir())
        assert 0 < len(files) <= 2 * campaign.KEPT_MAX
        assert max(file.stat().st_size for file in files) <= campaign.KEPT_BYTES_MAX


def fuzz(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run `make fuzz` without make."""
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
