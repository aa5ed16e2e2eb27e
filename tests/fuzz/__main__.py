"""`make fuzz`: attacks all code that reads untrusted input, and reports broken guarantees.

Each target is attacked in turn for an equal share of the time: first with the repository's corpus
and the working corpus below build/fuzz, then with mutations of inputs that reached new code paths.
Each finding is written to a file and reported with the command that replays it.
"""

import argparse
import random
import sys
from pathlib import Path

from tests.fuzz import campaign
from tests.fuzz.surroundings import surroundings
from tests.fuzz.target import BROKEN, TARGETS
from tests.helpers.repository import ROOT

FOLDER = Path("build/fuzz")
MINUTES = 10.0
COLUMNS = "{:<16} {:>10} {:>9} {:>6} {:>9} {:>9} {:>6} {:>6}  {}"


def main() -> int:
    """Fuzz, print, and return the exit code: 1 for a finding."""
    options = _options()
    try:
        import atheris  # noqa: F401 - tests whether it is installed
    except ImportError:
        _say("make fuzz needs atheris, which is available for CPython 3.11-3.13 on Linux, x86-64.")
        return 2
    if options.replay is not None:
        return _replay(options.replay)
    names = options.only or list(TARGETS)
    seconds = options.minutes * 60 / len(names)
    _say(
        COLUMNS.format(
            "target", "inputs", "inputs/s", "new", "MB start", "MB end", "files", "end", "findings"
        )
    )
    failed, inputs = False, 0
    for name in names:
        try:
            result = _attack(name, seconds, options)
        except Exception as error:  # noqa: BLE001 - the other targets still have their turn
            # For example, a busy machine starts a server too slowly.
            result = campaign.Result(name, broken=f"did not run: {type(error).__name__}: {error}")
            _print(result)
        failed |= not result.ok
        inputs += result.inputs
    _say(f"{inputs} inputs, {'not all is well: see above' if failed else 'nothing found'}")
    return int(failed)


def _attack(name: str, seconds: float, options: argparse.Namespace) -> campaign.Result:
    """Attack a target in its environment, and print the result."""
    folder = options.folder / name
    with surroundings((TARGETS | BROKEN)[name].needs) as variables:
        result = campaign.run(name, seconds, folder, variables, seed=options.seed)
        _print(result)
        if options.keep and result.ok:
            kept = campaign.CORPUS / (TARGETS | BROKEN)[name].module
            before, after = campaign.keep(name, folder, variables, kept)
            _say(f"    kept in {kept.relative_to(ROOT)}: {after} (were {before})")
    return result


def _print(result: campaign.Result) -> None:
    _say(
        COLUMNS.format(
            result.target,
            result.inputs,
            round(result.inputs / result.seconds) if result.seconds else "-",
            result.new,
            f"{result.rss_start:.0f}",
            f"{result.rss_end:.0f}",
            result.files_start,
            result.files_end,
            len(result.findings) or result.broken or "none",
        )
    )
    for path in result.findings:
        _say(f'    {path}: make fuzz ARGS="--replay {path}"')
    if result.findings:
        _, _, said = result.output.partition("=== Uncaught Python exception: ===")
        for line in (said or result.output[-1_500:]).splitlines()[:20]:
            _say(f"    | {line[:200]}")


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - for a person


def _replay(path: Path) -> int:
    """Replay the input of a finding."""
    name = next((part for part in path.parts[::-1] if part in TARGETS | BROKEN), None)
    if name is None:
        _say(f"{path}: no folder in its path has a target's name; please name the target")
        return 2
    with surroundings((TARGETS | BROKEN)[name].needs) as variables:
        code, output = campaign.replay(name, path, variables)
    _say(output)
    _say(f"{path}: {'found again' if code else 'nothing found'}")
    return int(code != 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="targets:\n"
        + "\n".join(f"  {name:<16} {entry.about}" for name, entry in TARGETS.items())
        + '\n\nPass arguments as in: make fuzz ARGS="--minutes 30 --only secrets,policy"',
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        help=f"in total, shared equally (default {MINUTES:g})",
    )
    parser.add_argument(
        "--only", type=_names, metavar="TARGET[,TARGET]", help="these targets, instead of all"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=random.randrange(1, 2**31),  # noqa: S311 - any seed is fine
        help="seed of the mutations; makes single-threaded targets repeatable (default: random)",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="afterwards, reduce the corpus to the fewest inputs that reach all known paths",
    )
    parser.add_argument("--replay", type=Path, metavar="FILE", help="attack with one input only")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help=f"to work in (default {FOLDER})"
    )
    return parser.parse_args()


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in TARGETS | BROKEN:
            raise argparse.ArgumentTypeError(f"no target {name!r}, only {', '.join(TARGETS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
