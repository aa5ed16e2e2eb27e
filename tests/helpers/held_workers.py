"""Workers that stop at the start of their process until a test continues them."""

import contextlib
from pathlib import Path

import psutil
import pytest

from tests.helpers.service_process import Service
from tests.helpers.waiting import eventually

__all__ = ["Hold"]

# A worker runs this before the service's own code.
SITE = """
import os, pathlib, signal, sys
if sys.orig_argv[-1] == "worker" and pathlib.Path({!r}).exists():
    os.kill(os.getpid(), signal.SIGSTOP)
"""


class Hold:
    """Stops the workers of services that are started after it was created, as long as it is `on`.

    The workers stop themselves before the service's own code runs, because a process that watched
    for them might be late.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder / "hold"
        self._folder.mkdir()
        self._flag = self._folder / "on"
        (self._folder / "sitecustomize.py").write_text(SITE.format(str(self._flag)))
        monkeypatch.setenv("PYTHONPATH", str(self._folder))

    def on(self) -> None:
        self._flag.touch()

    async def one(self, service: Service) -> psutil.Process:
        """Wait until a worker of this service has stopped, and return it."""

        def held() -> psutil.Process | None:
            for process in psutil.Process(service.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.status() == psutil.STATUS_STOPPED:
                        return process
            return None

        found: psutil.Process = await eventually(held, "a worker starts")
        return found

    def off(self, process: psutil.Process) -> None:
        """Continue this worker, and stop no later ones."""
        self._flag.unlink()
        process.resume()
