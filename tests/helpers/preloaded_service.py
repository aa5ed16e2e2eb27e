"""What a fork server imports to run the service; see `forked_service.py`.

Importing it also makes a supervisor fork its workers: they would each import everything again.
"""

import asyncio
import gc
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

# As in latchkey_service/__main__.py, which comes too late for what is imported here.
sys.modules.setdefault("rich", None)  # type: ignore[arg-type]  # blocks the import

import asyncpg.protocol  # noqa: F401, E402
import cryptography.x509  # noqa: F401, E402
import grpc.aio  # noqa: F401, E402
import uvloop  # noqa: F401, E402
from latchkey_service.process import (  # noqa: E402
    supervisor,  # noqa: F401
    worker,  # noqa: F401
)
from latchkey_service.rpc import call_report, managed_calls, verify_calls  # noqa: E402
from latchkey_service.settings import logs  # noqa: E402
from latchkey_service.settings.stream_writer import StreamWriter  # noqa: E402
from latchkey_service.transport import native  # noqa: F401, E402

__all__: list[str] = []

MODULE: Final = "latchkey_service"
WORKER: Final = (sys.executable, "-P", "-m", MODULE, "worker")
# A worker runs this before the service's own code. With it, a test changes what workers do.
SITE: Final = "sitecustomize.py"
_create = asyncio.create_subprocess_exec


async def _create_or_fork(*arguments: Any, **options: Any) -> asyncio.subprocess.Process:
    """Fork a worker, and start every other program as usual."""
    if arguments == WORKER:
        run = partial(_run_worker, options["env"], options["pass_fds"])
        return await _create(*arguments, **options, preexec_fn=run)
    return await _create(*arguments, **options)


def _run_worker(environment: Mapping[str, str], kept: Sequence[int]) -> None:
    """Run a worker in a process that was just forked, instead of executing a program."""
    code: object = 1
    try:
        _forget_supervisor(environment, kept)
        sys.argv = [MODULE, "worker"]
        sys.orig_argv = list(WORKER)
        for folder in environment.get("PYTHONPATH", "").split(os.pathsep):
            if (path := Path(folder, SITE)).exists():
                runpy.run_path(str(path))
        runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001 - the supervisor's code must not go on here
        traceback.print_exc()
    finally:
        os._exit(code if isinstance(code, int) else 1)


def _forget_supervisor(environment: Mapping[str, str], kept: Sequence[int]) -> None:
    """Give this process what a new Python would have. The streams are those of the worker."""
    # Its objects stay, or they would close files that have the same numbers here.
    gc.freeze()
    low = 3
    for file in (*sorted(kept), os.sysconf("SC_OPEN_MAX")):
        os.closerange(low, file)
        low = file + 1
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if signal.getsignal(number) not in (None, signal.SIG_DFL):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.environ.clear()
    os.environ.update(environment)
    # Each worker has its own folder for temporary files.
    tempfile.tempdir = None
    time.tzset()
    # -P
    sys.path.pop(0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr.reconfigure(line_buffering=True)
    # Their threads and locks belong to the supervisor.
    logs._stdout, logs._stderr = StreamWriter(logs.STDOUT), StreamWriter(logs.STDERR)


def _renew_ids() -> None:
    """Give this process other ids for its calls than those of the process that forked it."""
    ids = call_report.new_ids()
    for module in (call_report, managed_calls, verify_calls):
        vars(module)["NEW_IDS"] = ids


os.register_at_fork(after_in_child=_renew_ids)
asyncio.create_subprocess_exec = _create_or_fork
