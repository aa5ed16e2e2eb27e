"""One server process under the supervisor.

The settings, peppers and policy arrive on stdin, one line each. So a restarted worker gets those
that the supervisor has checked, even if the files or `.env` have changed since then. Each further
line is a new policy to activate.

The worker stops on SIGTERM, or at the end of stdin, which the supervisor keeps open. So a worker
never outlives a killed supervisor.
"""

import asyncio
import contextlib
import gc
import json
import os
import resource
import signal
import stat
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import uvloop

from latchkey_service.access.policy import PolicyError
from latchkey_service.access.policy_file import SIZE_MAX
from latchkey_service.process.metrics_server import COLLECT, answer_line
from latchkey_service.process.privileges import forbid_dumps, give_up_root
from latchkey_service.process.server import Server
from latchkey_service.process.wiring import ended, running
from latchkey_service.process.worker_watch import beat
from latchkey_service.secret_format import Keyring
from latchkey_service.settings import logs
from latchkey_service.settings.loading import READY, from_json
from latchkey_service.settings.settings import Settings
from latchkey_service.settings.webhook_secrets import WebhookError
from latchkey_service.tokens import pepper_file
from latchkey_service.transport import tls
from latchkey_service.transport.transports import limits_of

__all__ = ["main"]

# Nobody waits for an orphaned worker, and the next start needs its address.
ORPHAN_GRACE_SECONDS = 0.5
# As JSON, a valid policy is at most twice as long: quotes, backslashes and newlines are escaped.
LINE_MAX = 2 * SIZE_MAX + 1024
# Python's defaults are (700, 10, 10): a collection every few calls.
GC_THRESHOLDS = (20_000, 20, 50)
# For the event loop to close, after the last answer. It takes milliseconds, unless it waits for DNS
# look-ups. Shorter than the time after which the supervisor kills the worker.
CLOSE_SECONDS = 2.0


def main() -> int:
    """Serve and return the exit code. Raises ConfigError."""
    # A hang-up sent to all processes of the service concerns only the supervisor.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _allow_connections()
    try:
        return _run_and_close()
    except (
        pepper_file.PepperFileError,
        PolicyError,
        tls.TlsError,
        WebhookError,
        RuntimeError,
        OSError,
    ) as error:
        # The worker cannot start without its keys, policy and addresses.
        logs.logger().error("worker cannot start", error=str(error))
        return 1
    finally:
        logs.flush()


def _run_and_close() -> int:
    """Serve, close the event loop, and return the exit code.

    Exits at once if the loop does not close in time: uvloop waits for look-ups in progress, and
    Python for the threads of the loop. A look-up in DNS may hang for a minute.
    """
    exiting: threading.Timer | None = None

    async def run() -> int:
        nonlocal exiting
        code = await _run()
        exiting = threading.Timer(CLOSE_SECONDS, _exit_at_once, (code,))
        exiting.daemon = True
        exiting.start()
        return code

    try:
        return uvloop.run(run())
    finally:
        if exiting is not None:
            exiting.cancel()


def _exit_at_once(code: int) -> None:
    logs.flush()
    os._exit(code)


async def _run() -> int:
    handed = asyncio.StreamReader(limit=LINE_MAX)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(handed), sys.stdin
    )
    settings = from_json(await handed.readline())
    # Before the keys arrive.
    forbid_dumps(settings)
    logs.configure(logs.format_of(settings.log_format), settings.log_level)
    logs.start()
    keyring = pepper_file.parse((await handed.readline()).decode("ascii", "replace"))
    policy = _policy(await handed.readline())
    if settings.tls_listen is not None:
        tls.check_only_tls_1_3()
    _warn_of_files(settings)
    return await _serve(settings, keyring, policy, handed)


class _Policies:
    """The policies received from the supervisor. Only the newest is activated.

    Event loop only.
    """

    def __init__(
        self, handed: asyncio.StreamReader, text: str | None, collect: Callable[[], None]
    ) -> None:
        self._handed = handed
        # Called when the supervisor asks for the metrics.
        self._collect = collect
        self._text = self._in_force = text
        self._server: Server | None = None

    def latest(self) -> str | None:
        """Return the newest policy. The caller must activate it."""
        self._in_force = self._text
        return self._text

    async def put_in_force(self, server: Server) -> None:
        """Activate policies that have arrived meanwhile, and every later one."""
        while self._in_force != self._text and (text := self.latest()) is not None:
            await server.replace_policy(text)
        # There is no await in between, so the server receives every later policy at once. Before
        # this point, `take` only stores them, or an older policy could replace a newer one.
        self._server = server

    async def take(self) -> None:
        """Receive policies and other requests until the supervisor is gone. Raises PolicyError."""
        # A line without its newline is incomplete, and the rest will never arrive.
        while (line := await self._handed.readline()).endswith(b"\n"):
            if line == COLLECT:
                self._collect()
                continue
            self._text = text = _policy(line)
            if self._server is not None:
                await self._server.replace_policy(text)


def _policy(line: bytes) -> Any:
    """Return the policy's text, or None if there is no policy. Raises PolicyError."""
    try:
        return json.loads(line)
    except ValueError:
        raise PolicyError("received no policy from the supervisor") from None


def _allow_connections() -> None:
    """Raise the limit on open files to its maximum: a client that watches takes three."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS may refuse its own hard limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _warn_of_files(settings: Settings) -> None:
    """Log if the limit on open files allows fewer connections than the settings."""
    limits = limits_of(settings)
    if limits.connections_max < settings.connections_max:
        asked = "connections_max" in settings.model_fields_set
        # Nobody who has not set the number needs to know that it is smaller here.
        (logs.logger().warning if asked else logs.logger().debug)(
            "fewer connections: the limit on open files is low",
            connections_max=limits.connections_max,
            open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        )


async def _serve(
    settings: Settings, keyring: Keyring, policy: str | None, handed: asyncio.StreamReader
) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    orphaned = failed = False
    answers: asyncio.WriteTransport | None = None

    def send_metrics() -> None:
        """Send the metrics to the supervisor, unless it has yet to read the previous ones."""
        if answers is not None and not answers.get_write_buffer_size():
            answers.write(answer_line(server.metrics.collect()))

    def fail() -> None:
        """Exit, so that the supervisor starts a new worker."""
        nonlocal failed
        failed = True
        stop.set()

    async def take_policies() -> None:
        """Receive policies until the supervisor is gone."""
        nonlocal orphaned
        await policies.take()
        orphaned = True
        stop.set()

    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, stop.set)
    # Runs until the end, because calls continue during the shutdown.
    beating = asyncio.create_task(beat(), name="beat")
    beating.add_done_callback(partial(ended, fail))
    # This task runs until the end, too, because a revoked right must not remain for calls that
    # continue. It starts now, because otherwise the worker would first serve with a policy that
    # changed while it started.
    policies = _Policies(handed, policy, send_metrics)
    taking = asyncio.create_task(take_policies(), name="take_policies")
    taking.add_done_callback(partial(ended, fail))
    async with running(settings, keyring, policies.latest, fail) as server:
        await policies.put_in_force(server)
        give_up_root()
        # Linux allows dumps again when a process changes its user.
        forbid_dumps(settings)
        # Exclude the objects that exist now from collection. Reference counts free what calls leave
        # behind, so the collector may also run less often.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        sys.stdout.buffer.write(READY)
        sys.stdout.buffer.flush()
        if stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode):
            # Writes without blocking, because the supervisor may not be reading. On a copy, because
            # the transport closes its file. Without a supervisor, nobody asks for the metrics.
            copy = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
            answers, _ = await loop.connect_write_pipe(asyncio.Protocol, copy)
        await stop.wait()
        if orphaned:
            logs.logger().warning("supervisor is gone, stopping")
            await server.stop(ORPHAN_GRACE_SECONDS)
    if answers is not None:
        answers.close()
    taking.cancel()
    beating.cancel()
    return 1 if failed else 0
