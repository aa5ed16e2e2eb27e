"""A short run of each target of `make fuzz`, and a proof that the fuzzer finds bugs.

Each run is a separate process, because libFuzzer ends its process.
"""

import contextlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fuzz import __main__ as command
from tests.fuzz import campaign
from tests.fuzz.surroundings import surroundings
from tests.fuzz.target import TARGETS
from tests.helpers.repository import ROOT

pytestmark = [
    pytest.mark.slow("fuzzes each target"),
    pytest.mark.skipif(
        importlib.util.find_spec("atheris") is None,
        reason="atheris is available only for CPython 3.11-3.13 on Linux, x86-64",
    ),
]
SECONDS = 1
SEED = 20_261_124
# Minimum number of inputs for each target, the corpus included: a fiftieth of the number on an idle
# machine, and fewer than with both cores busy.
INPUTS_MIN = {
    "secrets": 200,
    "page-tokens": 400,
    "policy": 24,
    "headers": 200,
    "non-utf8": 800,
    "messages-native": 20,
    "messages-grpcio": 20,
    "http2-native": 8,
    "http2-grpcio": 8,
    "http2-tls": 8,
    "seals": 200,
    "refused-native": 8,
    "refused-tls": 8,
}


@pytest.fixture
def folder() -> Path:
    """A folder below build, where the findings of a failed run are kept."""
    path = ROOT / "build" / "fuzz-test"
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="module")
def environment() -> Iterator[Callable[[str], dict[str, str]]]:
    """The environments of targets. Targets with the same needs use one after another."""
    started: dict[str, dict[str, str]] = {}
    with contextlib.ExitStack() as stack:

        def of(needs: str) -> dict[str, str]:
            if needs not in started:
                started[needs] = stack.enter_context(surroundings(needs))
            return started[needs]

        yield of


@pytest.mark.xdist_group("fuzz")
@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_found(
    name: str, folder: Path, environment: Callable[[str], dict[str, str]]
) -> None:
    """A second of generated input breaks no guarantee of a target and leaks no memory."""
    shutil.rmtree(folder / name, ignore_errors=True)
    variables = environment(TARGETS[name].needs)
    result = campaign.run(name, SECONDS, folder / name, variables, seed=SEED)
    assert result.ok, f"{result.findings} {result.broken}: {result.output[-4_000:]}"
    assert result.inputs >= INPUTS_MIN[name]
    assert result.rss_start > 0, "it was measured"


@pytest.mark.parametrize(("needs", "more", "fails"), [("tls", 500, False), ("tls", 520, True)])
def test_growing_memory_fails_a_run(tmp_path: Path, needs: str, more: int, fails: bool) -> None:
    """A run fails if the process under attack keeps more memory than an allocator keeps of a burst,
    and says how much. Growth during the warm-up does not count."""
    rss = [50] * 40 + [100] * 20 + [100 + more] * 40
    samples = tmp_path / "samples"
    samples.write_text(
        "".join(
            json.dumps({"time": n, "inputs": n, "rss": mb << 20, "files": 9}) + "\n"
            for n, mb in enumerate(rss)
        )
    )
    result = campaign.Result("http2-tls")
    campaign.measure(result, samples, campaign.GROWTH_MB_MAX[needs])
    assert result.rss_end - result.rss_start == more
    assert result.ok is not fails
    assert fails == ("memory grew by 520 MB" in result.broken)


def test_a_target_that_does_not_start_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """If a target's server does not start, the run fails and says so, after it has attacked the
    other targets."""
    ran: list[str] = []

    @contextlib.contextmanager
    def environment(needs: str) -> Iterator[dict[str, str]]:
        if needs == "tls":
            raise AssertionError("not within 20 s: the welcome line")
        yield {}

    def run(target: str, *_: object, **__: object) -> campaign.Result:
        ran.append(target)
        return campaign.Result(target)

    monkeypatch.setattr(command, "surroundings", environment)
    monkeypatch.setattr(campaign, "run", run)
    given = ["fuzz", "--only", "http2-tls,secrets,seals", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", given)
    assert command.main() == 1
    assert ran == ["secrets", "seals"]
    assert "did not run: AssertionError: not within 20 s" in capsys.readouterr().out


def test_a_seeded_bug_is_found(tmp_path: Path) -> None:
    """The fuzzer finds a parser that fails at two consecutive bytes. The run fails and keeps the
    input, which fails again with the printed command."""
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
    """The kept corpus reaches the same paths with as few inputs as possible, and earlier findings
    are kept."""
    kept = tmp_path / "kept"
    kept.mkdir()
    old = kept / "found-once"
    old.write_bytes(b"\0\x0a\x02\xff\xfe")
    for number in range(100):
        (kept / f"more of the same {number}").write_bytes(b"\0\x0a\x02ab" + b"\x10\x01" * number)
    before, after = campaign.keep("non-utf8", tmp_path / "work", {}, kept)
    assert before == 100
    assert 1 <= after <= 10
    assert len(list(kept.iterdir())) == after + 1
    assert old.exists()


def test_each_corpus_is_small_and_has_a_target() -> None:
    """The repository has only the inputs that a run needs to start from."""
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
