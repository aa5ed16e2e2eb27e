"""`make console`: Latchkey and the page together, on the embedded database, for trying them.

    python -m latchkey_console.together [ACCOUNT]

The service is a process of its own, started and stopped in order, and never imported: it is another
package. What it prints of calls to try is not repeated here.
"""

import contextlib
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import IO, Final

from latchkey_console import settings
from latchkey_console.running import run, stopping_signals

__all__ = ["main"]

ACCOUNT: Final = "acme"
# Making a database on a slow disk; the usual start takes two seconds.
START_SECONDS: Final = 90.0
STOP_SECONDS: Final = 20.0
_WELCOME: Final = re.compile(rb"Latchkey serves on (\S+) ")


class _NotStarted(Exception):
    """The service did not come up, and has said why."""


def main(arguments: list[str]) -> int:
    """Run both until Ctrl-C. Returns the exit code."""
    account = arguments[0] if arguments else ACCOUNT
    try:
        with _service() as address:
            chosen = settings.make(
                listen=os.environ.get("LATCHKEY_CONSOLE_LISTEN") or settings.LISTEN,
                account=account,
                target=address,
            )
            run(chosen)
    except settings.SettingsError as error:
        sys.stderr.write(f"latchkey: {error}\n")
        return 2
    except _NotStarted:
        sys.stderr.write(
            "latchkey: the service did not start. If one runs here already, this opens the page "
            f"on it: .venv/bin/latchkey console --account {shlex.quote(account)}\n"
        )
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


@contextlib.contextmanager
def _service() -> Iterator[str]:
    """Run the service and yield its address. Raises _NotStarted."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "latchkey_service"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        # Ctrl-C is for this process, which ends the service after the page.
        start_new_session=True,
    )
    try:
        # Ending this process, or closing its terminal, must end the other too.
        for number in stopping_signals():
            signal.signal(number, _interrupt)
        yield _address(process.stdout)
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_SECONDS)


def _address(output_pipe: IO[bytes] | None) -> str:
    if output_pipe is None:
        raise _NotStarted
    output, give_up = b"", time.monotonic() + START_SECONDS
    while (match := _WELCOME.search(output)) is None:
        left = give_up - time.monotonic()
        if left <= 0 or not select.select([output_pipe], [], [], left)[0]:
            raise _NotStarted
        chunk = os.read(output_pipe.fileno(), 65_536)
        if not chunk:
            raise _NotStarted
        output += chunk
    address = match[1].decode()
    host, _, port = address.rpartition(":")
    # An address that means all of this machine's is reached on loopback.
    return f"127.0.0.1:{port}" if host in ("0.0.0.0", "[::]") else address  # nosec B104 # noqa: S104


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
