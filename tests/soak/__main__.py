"""`make soak`: looks for resource growth in a service that is used in every way for half an hour.

The shipped service runs under a mixed load: clients connect and disconnect, streams break, calls
are cancelled, and policies change. Every answer is checked. Memory, descriptors, threads, tasks,
connections and rows are sampled every few seconds. The run fails if one of them keeps growing, if
an answer is wrong, or if an error has no explanation.
"""

import argparse
import asyncio
import json
import logging
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from tests.soak import report
from tests.soak.run import run

RESULT = Path("build/soak.json")
# Where the logs of a failed soak are kept.
KEPT = Path("build/soak")


def main() -> int:
    """Run, print, and return the exit code: 1 for growth, a wrong answer, or an unexplained
    error."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="duration, default 30")
    parser.add_argument("--scale", type=float, default=1.0, help="factor for the rates, default 1")
    options = parser.parse_args()
    # Shut down cleanly, even if the shell ignores Ctrl-C.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    # The library logs each broken stream, and this load breaks streams on purpose.
    logging.getLogger("latchkey").setLevel(logging.ERROR)
    # Postgres' own account needs access.
    scratch = Path(tempfile.mkdtemp(prefix="latchkey-soak-", dir="/tmp"))
    scratch.chmod(0o755)
    failed = True
    try:
        found = asyncio.run(run(scratch, options.minutes * 60, scale=options.scale, say=_say))
        _say("\n".join(report.table(found)))
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(report.document(found), indent=2) + "\n")
        _say(f"\nThe full result is in {RESULT}.")
        complaints = report.complaints(found)
        for complaint in complaints:
            _say(f"FAILED: {complaint}")
        failed = bool(complaints)
    except KeyboardInterrupt:
        failed = False
        return 130
    finally:
        if failed:
            shutil.rmtree(KEPT, ignore_errors=True)
            shutil.copytree(
                scratch, KEPT, ignore=shutil.ignore_patterns("data", "*.pem", "*.key", "live")
            )
            _say(f"The logs are in {KEPT}.")
        shutil.rmtree(scratch, ignore_errors=True)
    return int(failed)


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - for a person


if __name__ == "__main__":
    sys.exit(main())
