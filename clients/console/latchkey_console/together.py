"""`make console`: runs Latchkey with the embedded database and the console, for a trial.

    python -m latchkey_console.together [ACCOUNT]

If Latchkey already serves, such as by `make run` in another terminal, this runs only the console.
This module starts the service as a separate process and stops it after the console. It never
imports the service, which is another package. It does not repeat the example calls that the service
prints.
"""

import contextlib
import importlib.util
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import IO, Final

from latchkey_console import extra, grpc_core

__all__ = ["main"]

ACCOUNT: Final = "acme"
# Enough to create a database on a slow disk. A typical start takes two seconds.
START_SECONDS: Final = 90.0
STOP_SECONDS: Final = 20.0
# On this machine.
CONNECT_SECONDS: Final = 1.0
# The service's default.
LISTEN: Final = "127.0.0.1:50051"
WILDCARDS: Final = ("0.0.0.0", "[::]")  # noqa: S104 - recognised, not listened on
_WELCOME: Final = re.compile(rb"Latchkey serves on (\S+) ")


class _NotStarted(Exception):
    """The service did not start. It has already printed the reason."""


def main(arguments: list[str]) -> int:
    """Run both until Ctrl-C. Returns the exit code."""
    if not extra.is_installed():
        sys.stderr.write(f"latchkey: the console is not installed; {extra.INSTALL}\n")
        return 1
    if importlib.util.find_spec("latchkey_service") is None:
        sys.stderr.write(
            "latchkey: the service is not installed; install it from a clone of Latchkey with: "
            "pip install ./proto './service[embedded]'\n"
        )
        return 1
    # Only now, because it needs the libraries of the extra.
    from latchkey_console import settings  # noqa: PLC0415
    from latchkey_console.running import run, stopping_signals  # noqa: PLC0415

    account = arguments[0] if arguments else ACCOUNT
    try:
        running = _running()
        if running is not None:
            sys.stderr.write(f"Latchkey already serves on {running}. The console uses it.\n")
        starting = _service(stopping_signals()) if running is None else nullcontext(running)
        with starting as address:
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
            "latchkey: the service did not start. If Latchkey already runs here, open the page for "
            f"it with: .venv/bin/latchkey console --account {shlex.quote(account)}\n"
        )
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


@contextlib.contextmanager
def _service(stopping: Sequence[signal.Signals]) -> Iterator[str]:
    """Run the service, yield its address, and stop it after a signal. Raises _NotStarted."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "latchkey_service"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=grpc_core.for_the_service(),
        # Ctrl-C must reach only this process, which stops the service after the console.
        start_new_session=True,
    )
    try:
        # Ending this process or closing its terminal must stop the service too.
        for number in stopping:
            signal.signal(number, _interrupt)
        yield _address(process.stdout)
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_SECONDS)


def _running() -> str | None:
    """Return the address of a service that already serves where a new one would, or None."""
    address = os.environ.get("LATCHKEY_LISTEN") or LISTEN
    host, separator, port = address.rpartition(":")
    if address.startswith("unix:") or not separator or not port.isdigit() or port == "0":
        return None  # a new one says what is wrong
    host = "127.0.0.1" if host in WILDCARDS else host
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS):
            return f"{host}:{port}"
    except OSError:
        return None


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
    # A wildcard address is reachable on loopback.
    return f"127.0.0.1:{port}" if host in WILDCARDS else address


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
