"""The fuzzing process: one target under atheris, which is libFuzzer with Python's coverage.

Started by `campaign.py` as `python -m tests.fuzz.engine TARGET`, with libFuzzer's own arguments
after it. libFuzzer ends the process without Python's clean-up: therefore the parent owns everything
that needs clean-up, and all output is written at once.
"""

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import atheris

# Instrumented modules, in which the fuzzer looks for new paths. tomllib, because it reads the
# policy.
PACKAGES = ["latchkey", "latchkey_cli", "latchkey_coherence", "latchkey_service", "tomllib"]
SAMPLE_SECONDS = 0.2
# Share of the inputs mutated as plain bytes, although the target's own mutator could change them.
AS_BYTES = 0.25


def main() -> None:
    """Fuzz until libFuzzer ends the process: 0 for nothing found."""
    name, *arguments = sys.argv[1:]
    with atheris.instrument_imports(include=PACKAGES):
        from tests.fuzz.target import load
    with atheris.instrument_imports(include=PACKAGES):
        target = load(name)
    # To merge, libFuzzer starts itself again with these words through a shell.
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
    """Return `target.one` with a wrapper that regularly records its progress and cost."""
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
