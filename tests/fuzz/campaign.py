"""One run of one target: the fuzzing process, its corpus, and its result."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.target import BROKEN, TARGETS
from tests.helpers.repository import ROOT

__all__ = ["CORPUS", "GROWTH_MB_MAX", "Result", "keep", "measure", "replay", "run"]

CORPUS = Path(__file__).parent / "corpus"
# An input that takes this long is in an endless loop, on any machine.
INPUT_SECONDS_MAX = 25
# Time for the start, the corpus, and an input that hangs; after this the process is ended.
EXTRA_SECONDS = 90.0
MEMORY_MB_MAX = 2_048
# Size of a target's corpus in the repository. Inputs named `found-…` are always kept.
KEPT_MAX = 40
KEPT_BYTES_MAX = 16_384
# Warm-up, in which caches and libFuzzer's own tables fill.
WARM_UP = 0.4
# Memory growth after the warm-up, of the processes under attack, by what their target needs. More
# fails the run. libFuzzer keeps its new inputs in memory, some megabytes. A server's allocator
# keeps the memory of the largest burst, which may come at any time: of a worker that had grown from
# 112 to 160 MB in six minutes on TLS, `malloc_trim` left 102, and Python's objects were as many as
# before. grpcio also keeps some connections of clients that have gone for half a minute. In
# equal blocks of hundreds of connections, no kind of connection or call kept more than 30 bytes.
# With grpcio, a connection may have any number of streams until the client knows the limit, so a
# burst can take hundreds of megabytes.
GROWTH_MB_MAX = {
    "nothing": 24,
    "postgres": 64,
    "native": 64,
    "grpcio": 512,
    "tls": 512,
    # One connection at a time: 100 calls, of which grpcio receives no message.
    "native-policy": 96,
    "tls-policy": 64,
}


@dataclass(slots=True)
class Result:
    """The result of a run. Memory and open files are those of the processes under attack."""

    target: str
    inputs: int = 0
    seconds: float = 0.0
    new: int = 0
    """New inputs that reach paths beyond those of the corpus."""
    rss_start: float = 0.0
    """MB, in the middle of the run's first part after its warm-up."""
    rss_end: float = 0.0
    files_start: int = 0
    files_end: int = 0
    findings: list[Path] = field(default_factory=list)
    output: str = field(default="", repr=False)
    broken: str = ""
    """Why the run itself failed, without a finding."""

    @property
    def ok(self) -> bool:
        return not (self.findings or self.broken)


def run(
    target: str,
    seconds: float,
    folder: Path,
    variables: Mapping[str, str],
    *,
    seed: int | None = None,
) -> Result:
    """Fuzz a target for this many seconds, with its working corpus, log and findings in
    `folder`."""
    corpus, findings = folder / "corpus", folder / "findings"
    seeds = folder / "seeds"
    for path in (corpus, findings, seeds):
        path.mkdir(parents=True, exist_ok=True)
    before = set(findings.iterdir())
    samples = folder / "samples"
    samples.unlink(missing_ok=True)
    arguments = [
        f"-max_total_time={max(1, round(seconds))}",
        f"-artifact_prefix={findings}/",
        "-print_final_stats=1",
    ]
    if seed is not None:
        arguments.append(f"-seed={seed}")
    given = [str(path) for path in (corpus, _kept(target), seeds) if path.is_dir()]
    variables = {**variables, "FUZZ_SAMPLES": str(samples), "FUZZ_SEEDS": str(seeds)}
    code, output = _engine(target, [*arguments, *given], variables, seconds + EXTRA_SECONDS)
    (folder / "log").write_text(output)
    result = Result(target, output=output)
    result.findings = sorted(set(findings.iterdir()) - before)
    if match := re.search(r"number_of_executed_units:\s*(\d+)", output):
        result.inputs = int(match[1])
    if match := re.search(r"new_units_added:\s*(\d+)", output):
        result.new = int(match[1])
    if code != 0 and not result.findings:
        result.broken = f"exit code {code}; see {folder / 'log'}"
    measure(result, samples, GROWTH_MB_MAX[(TARGETS | BROKEN)[target].needs])
    return result


def replay(target: str, path: Path, variables: Mapping[str, str]) -> tuple[int, str]:
    """Attack with one input; return the exit code (0 for nothing found) and the output."""
    return _engine(target, ["-runs=1", str(path)], variables, EXTRA_SECONDS)


def keep(target: str, folder: Path, variables: Mapping[str, str], kept: Path) -> tuple[int, int]:
    """Reduce `kept` to the fewest inputs that reach all known paths, including those from `folder`.

    Returns the numbers of inputs before and after.
    """
    merged = folder / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    merged.mkdir(parents=True)
    kept.mkdir(parents=True, exist_ok=True)
    given = [str(path) for path in (kept, folder / "corpus", folder / "seeds") if path.is_dir()]
    code, output = _engine(
        target, ["-set_cover_merge=1", str(merged), *given], variables, EXTRA_SECONDS * 10
    )
    if code:
        raise RuntimeError(f"merging failed:\n{output[-2_000:]}")
    before = [path for path in kept.iterdir() if not path.name.startswith("found-")]
    for path in before:
        path.unlink()
    chosen = sorted(
        (path for path in merged.iterdir() if path.stat().st_size <= KEPT_BYTES_MAX),
        key=lambda path: path.stat().st_size,
    )[:KEPT_MAX]
    for path in chosen:
        shutil.copyfile(path, kept / path.name[:16])
    return len(before), len(chosen)


def _kept(target: str) -> Path:
    """Return the folder of a target's corpus in the repository; the transports share one."""
    return CORPUS / (TARGETS | BROKEN)[target].module


def _engine(
    target: str, arguments: Sequence[str], variables: Mapping[str, str], seconds: float
) -> tuple[int, str]:
    try:
        process = subprocess.run(
            [
                *(sys.executable, "-m", "tests.fuzz.engine", target),
                f"-timeout={INPUT_SECONDS_MAX}",
                f"-rss_limit_mb={MEMORY_MB_MAX}",
                *arguments,
            ],
            cwd=ROOT,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return 124, (error.stdout or b"").decode("utf-8", "replace")
    return process.returncode, process.stdout.decode("utf-8", "replace")


def measure(result: Result, samples: Path, growth_mb_max: float) -> None:
    """Add what the samples say about memory and files to the result, and judge it."""
    lines: list[dict[str, Any]] = []
    if samples.exists():
        lines = [json.loads(line) for line in samples.read_text().splitlines() if line]
    if len(lines) < 2:
        return
    result.seconds = lines[-1]["time"] - lines[0]["time"]
    warm = lines[int(len(lines) * WARM_UP) :]
    # Medians of some samples, because a single sample may fall into a burst.
    few = max(1, len(warm) // 4)
    first, last = warm[:few], warm[-few:]
    result.rss_start, result.rss_end = (
        statistics.median(sample["rss"] for sample in part) / 2**20 for part in (first, last)
    )
    result.files_start, result.files_end = (
        int(statistics.median_low([sample["files"] for sample in part])) for part in (first, last)
    )
    growth = result.rss_end - result.rss_start
    if growth > growth_mb_max and not result.broken:
        result.broken = f"memory grew by {growth:.0f} MB, not at most {growth_mb_max:.0f}"
