"""The process that fuzzes: one target under atheris, which is libFuzzer with Python's coverage.

Started by `campaign.py` as `python -m tests.fuzz.engine TARGET`, with libFuzzer's own arguments
after it. libFuzzer ends the process without any of Python's endings: all that is to be cleaned up
belongs to the parent, and what is to be known is written as it comes.
"""

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import atheris

# What is instrumented, so that new paths through it are what the fuzzer looks for. tomllib, because
# it reads the policy.
PACKAGES = ["latchkey", "latchkey_cli", "latchkey_coherence", "latchkey_service", "tomllib"]
SAMPLE_SECONDS = 0.5
# How many of the inputs that the target's own mutator knows to change are changed as mere bytes.
AS_BYTES = 0.25


def main() -> None:
    """Fuzz until libFuzzer ends the process: 0 for nothing found."""
    name, *arguments = sys.argv[1:]
    with atheris.instrument_imports(include=PACKAGES):
        from tests.fuzz.target import load
    with atheris.instrument_imports(include=PACKAGES):
        target = load(name)
    # libFuzzer starts itself again to merge, by these words and a shell.
    program = f"{sys.executable} -m tests.fuzz.engine {name}"
    _write_seeds(target)
    options: dict[str, Any] = {}
    if target.mutates:
        options["custom_mutator"] = _mutator(target)
    atheris.Setup(
        [program, f"-max_len={target.length_max}", *arguments], _counted(target), **options
    )
    atheris.Fuzz()


def _write_seeds(target: Any) -> None:
    if folder := os.environ.get("FUZZ_SEEDS"):
        for number, seed in enumerate(target.seeds()):
            Path(folder, f"seed-{number:03}").write_bytes(seed)


def _mutator(target: Any) -> Any:
    def mutate(data: bytes, length_max: int, seed: int) -> bytes:
        chance = random.Random(seed)  # noqa: S311 - repeatable
        if not data or chance.random() < AS_BYTES:
            return bytes(atheris.Mutate(data, length_max))
        return bytes(target.mutate(data, length_max, chance)[:length_max])

    return mutate


def _counted(target: Any) -> Any:
    """Return `target.one` that writes down, twice a second, how far it is and at what cost."""
    path = os.environ.get("FUZZ_SAMPLES")
    if path is None:
        return target.one
    out = Path(path).open("a", buffering=1)  # noqa: SIM115 - for as long as the process lasts
    one, inputs, again = target.one, 0, 0.0

    def counted(data: bytes) -> None:
        nonlocal inputs, again
        one(data)
        inputs += 1
        if (now := time.monotonic()) < again:
            return
        again = now + SAMPLE_SECONDS
        target.settle()
        processes = target.processes()
        sample = {
            "time": now,
            "inputs": inputs,
            "rss": sum(process.memory_info().rss for process in processes),
            "files": sum(process.num_fds() for process in processes),
        }
        out.write(json.dumps(sample) + "\n")

    return counted


if __name__ == "__main__":
    main()
