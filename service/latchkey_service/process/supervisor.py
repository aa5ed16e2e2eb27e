"""Starts Postgres, migrates the schema, starts the workers, keeps all running, and stops them.

The supervisor serves no calls, so it has few ways to fail. Workers are separate processes from the
start, never forks: gRPC does not survive a fork.

A worker gets everything from the supervisor, and reads neither the environment nor `.env` nor the
policy file. If each worker watched the policy file itself, one worker could see a short-lived
policy that another worker, or one just starting, misses. If the file then became invalid, the
workers would keep different policies, and some would still grant revoked rights. So only the
supervisor reads the file. It sends the same policies in the same order to all workers, and the
latest policy to each worker that starts.
"""

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pydantic import SecretStr

from latchkey_service.access.policy import PolicyError, parse
from latchkey_service.access.policy_file import SIZE_MAX, PolicyFile, read_text
from latchkey_service.errors import StoreUnavailable
from latchkey_service.postgres.embedded_cluster import EmbeddedError, EmbeddedPostgres
from latchkey_service.postgres.migrate import MigrationError
from latchkey_service.process.greeting import welcome
from latchkey_service.process.host_sharing import host_folder, variables
from latchkey_service.process.metrics_server import WorkerReports, serve_metrics
from latchkey_service.process.port_reservation import AddressError, reserved
from latchkey_service.process.privileges import account_of_workers, forbid_dumps
from latchkey_service.process.schema_at_start import prepare_schema
from latchkey_service.process.worker_process import (
    NotStarted,
    policy_line,
    send,
    spawn,
    temporary_folder,
)
from latchkey_service.process.worker_watch import Reason, WorkerWatch, memory_max_bytes
from latchkey_service.release import release
from latchkey_service.settings import logs
from latchkey_service.settings.loading import READY, file_warnings, to_json
from latchkey_service.settings.settings import PREFIX, Settings
from latchkey_service.tokens import pepper_file
from latchkey_service.tokens.pepper_enrolment import enrol
from latchkey_service.tokens.pepper_file import PepperFileError
from latchkey_service.tokens.token_store import TokenStore
from latchkey_service.transport import tls

__all__ = ["run"]

# A worker needs about half a second to import, connect and listen.
READY_TIMEOUT_SECONDS = 30.0
# A worker that exits at once must not be restarted in a tight loop.
RESTART_SECONDS_MIN, RESTART_SECONDS_MAX = 0.1, 5.0
# A worker that ran this long was healthy: the next restart uses the short delay again.
HEALTHY_SECONDS = 10.0
# Added to the drain and the grace period, for closing connections.
STOP_MARGIN_SECONDS = 5.0
POLL_SECONDS = 0.2
_REASONS = _NOT_STARTED, _NOT_READY, _EXITED = "not started", "not ready", "exited"
# Limit of bytes that a worker has not read: a few of the largest policies. A worker that far behind
# uses an old policy, and may grant rights that were revoked.
BACKLOG_MAX_BYTES = 8 * SIZE_MAX


class StartError(Exception):
    """The service cannot start. The message says why and what to do."""


def run(settings: Settings) -> int:
    """Run the service until SIGINT or SIGTERM. Returns the exit code."""
    format_ = logs.format_of(settings.log_format)
    logs.configure(format_, settings.log_level)
    postgres: EmbeddedPostgres | None = None
    try:
        forbid_dumps(settings)
        # Before Postgres starts, so that mistakes are reported at once.
        policy = _check_files(settings)
        for text in file_warnings(settings):
            logs.logger().warning("a file is not well protected", what_to_do=text)
        if settings.database_url is None:
            # Variables of libpq in the shell are about other databases, but the driver reads them.
            for name in [name for name in os.environ if name.startswith("PG")]:
                del os.environ[name]
            postgres = EmbeddedPostgres(settings.data_dir)
            # On the main thread, before any other thread exists: see embedded_cluster.py.
            with _sigterm_interrupts():
                database_url = postgres.start()
        else:
            database_url = settings.database_url.get_secret_value()
        logs.start()
        with (
            reserved(settings.listen) as listen,
            reserved(settings.tls_listen, "TLS_LISTEN") as tls_listen,
        ):
            supervisor = _Supervisor(settings, database_url, listen, tls_listen, postgres, policy)
            return asyncio.run(_run_then_block_signals(supervisor))
    except (
        AddressError,
        EmbeddedError,
        MigrationError,
        PepperFileError,
        StartError,
        StoreUnavailable,
    ) as error:
        logs.fail("cannot start", str(error), format_)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        # Ignored until the end, because a second Ctrl-C must not cut the database's shutdown short.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if postgres is not None:
            postgres.stop()
        logs.flush()


async def _run_then_block_signals(supervisor: "_Supervisor") -> int:
    """Run a supervisor; when it ends, block Ctrl-C until `run` ignores it.

    The end of the event loop restores the default effect of Ctrl-C. In the short time until `run`
    ignores the signal, it would end the process with a traceback.
    """
    try:
        return await supervisor.run()
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})


class _Supervisor:
    """Keeps `settings.workers` workers running."""

    def __init__(
        self,
        settings: Settings,
        database_url: str,
        listen: str,
        tls_listen: str | None,
        postgres: EmbeddedPostgres | None,
        policy: str | None,
    ) -> None:
        self._settings = settings
        self._database_url = database_url
        # A snapshot from the start. Later changes to `.env` apply from the next start on, because
        # they are unchecked, and all workers need the same settings.
        self._worker_settings = settings.model_copy(
            update={
                "database_url": SecretStr(database_url),
                "listen": listen,
                "tls_listen": tls_listen,
                "data_dir": settings.data_dir,
                "log_format": logs.format_of(settings.log_format),
            }
        )
        self._listen = listen
        self._tls_listen = tls_listen
        self._postgres = postgres
        self._peppers = b""
        self._policy_file: PolicyFile | None = None
        if settings.policy is not None and policy is not None:
            self._policy_file = PolicyFile(settings.policy, policy, self._send_policy)
        self._account = account_of_workers(settings)
        # The folder of the socket over which the workers share a lease.
        self._host_folder: str | None = None
        self._watch = WorkerWatch(memory_max_bytes(settings))
        # All reasons from the start, because Prometheus' `increase` does not see the first event of
        # a counter that begins with it.
        self._restarts = Counter[object](dict.fromkeys((*_REASONS, *map(str, Reason)), 0))
        self._reports = WorkerReports(settings.workers, release(), self._restarts)
        # Includes workers that are starting or stopping: they may answer calls.
        self._processes: set[asyncio.subprocess.Process] = set()
        self._stop = asyncio.Event()
        self._log = logs.logger()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop.set)
        if self._policy_file is not None:
            # Without a policy, SIGHUP ends us as usual, because there is nothing to reload.
            loop.add_signal_handler(signal.SIGHUP, self._policy_file.reload)
        policy_file = self._policy_file
        # From now on: the preparation may take as long as we wait for the database.
        following = [] if policy_file is None else [asyncio.create_task(policy_file.follow())]
        prepare = asyncio.create_task(self._prepare())
        try:
            # From now on too: one sees that the service waits for its database.
            with serve_metrics(self._settings.metrics_listen, self._reports) as address:
                if address is not None:
                    self._log.info("metrics served", address=address)
                if not await self._unless_stopped(prepare):
                    return 0
                with host_folder(self._settings, self._account) as self._host_folder:
                    return await self._serve(following)
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)

    async def _serve(self, following: "list[asyncio.Task[None]]") -> int:
        ready = [asyncio.Event() for _ in range(self._settings.workers)]
        workers = [asyncio.create_task(self._keep(number, up)) for number, up in enumerate(ready)]
        keeper = asyncio.create_task(self._keep_postgres())
        self._watch.start()
        try:
            all_up = asyncio.create_task(_all_set(ready))
            # None of these ends before the stop, except by an error.
            parts = [*workers, *following]
            await asyncio.wait({all_up, *parts}, return_when=asyncio.FIRST_COMPLETED)
            if all_up.done():
                self._report_serving()
                await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            all_up.cancel()
            self._stop.set()
            results = await asyncio.gather(*workers, return_exceptions=True)
        finally:
            self._watch.stop()
            keeper.cancel()
            kept = await asyncio.gather(keeper, return_exceptions=True)
        for result in [*results, *kept]:
            if isinstance(result, Exception):
                raise result
        for task in following:
            if task.done():
                task.result()
        self._log.info("stopped")
        return 0

    async def _prepare(self) -> None:
        """Migrate the schema and enrol the peppers. Raises the errors that `run` reports."""
        await prepare_schema(self._settings, self._database_url)
        store = await TokenStore.open(self._database_url, self._settings.pooler)
        try:
            keyring = await enrol(
                store,
                self._settings.pepper_path,
                named=self._settings.pepper_file is not None,
                shared=self._postgres is None,
            )
        finally:
            await store.close()
        self._peppers = pepper_file.render(keyring).encode()

    def _send_policy(self, text: str) -> None:
        """Send a valid policy to all workers. Each logs when it is in force."""
        for process in self._processes:
            if send(process, policy_line(text)) > BACKLOG_MAX_BYTES:
                self._log.error("killing a worker that reads no policies", pid=process.pid)
                with contextlib.suppress(ProcessLookupError):
                    process.kill()

    async def _keep(self, number: int, ready: asyncio.Event) -> None:
        """Run worker `number`, and restart it when it exits, until stopped."""
        loop = asyncio.get_running_loop()
        delay = RESTART_SECONDS_MIN
        while not self._stop.is_set():
            started = loop.time()
            end: dict[str, object]
            try:
                end = await self._run_worker(number, ready)
            except NotStarted as error:
                # The other workers continue.
                end = {"reason": _NOT_STARTED, "error": str(error)}
                if not ready.is_set():
                    raise StartError(f"worker {number} cannot be started: {error}") from error
            if self._stop.is_set():
                return
            if loop.time() - started > HEALTHY_SECONDS:
                delay = RESTART_SECONDS_MIN
            self._restarts[end["reason"]] += 1
            end["restarts_for_this_reason"] = self._restarts[end["reason"]]
            self._log.error("worker exited", worker=number, restart_seconds=delay, **end)
            await self._unless_stopped(asyncio.create_task(asyncio.sleep(delay)))
            delay = min(delay * 2, RESTART_SECONDS_MAX)

    async def _run_worker(self, number: int, ready: asyncio.Event) -> dict[str, object]:
        """Run a worker until it exits or we stop. Return how it ended, for the log.

        Raises NotStarted if no process can be started, and StartError if the first one fails.
        """
        with temporary_folder(self._settings) as folder:
            try:
                process = await self._spawn(number, folder)
            except (OSError, RuntimeError, MemoryError) as error:
                # No process, pipe, file or memory, or no thread to wait for it (Python 3.11).
                raise NotStarted(str(error) or type(error).__name__) from error
            reason = _EXITED
            reports: asyncio.Task[None] | None = None
            try:
                if not (fault := await self._starts(process)):
                    ready.set()
                    self._log.info("worker ready", worker=number, pid=process.pid)
                    reports = asyncio.create_task(self._reports.follow(number, process))
                    await self._unless_stopped(asyncio.create_task(process.wait()))
                elif not ready.is_set() and not self._stop.is_set():
                    raise StartError(f"worker {number} {fault}")
                else:
                    reason = _NOT_READY
            finally:
                await self._end(process)
                if reports is not None:
                    await asyncio.gather(reports, return_exceptions=True)
                self._processes.discard(process)
                killed = self._watch.remove(process)
            return {"reason": killed or reason, "exit_code": process.returncode}

    async def _spawn(self, number: int, folder: str | None) -> asyncio.subprocess.Process:
        """Start a worker with `folder` as its directory for temporary files."""
        read, write = os.pipe()
        try:
            process = await spawn(
                folder, write, self._account, variables(self._host_folder, number)
            )
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(write)
        self._watch.add(process, read)
        # Send the peppers that were checked. By now, the file may have others, and a worker that
        # lacked one would treat live tokens as UNKNOWN.
        policy = None if self._policy_file is None else self._policy_file.text
        send(
            process,
            to_json(self._worker_settings).encode("ascii"),
            self._peppers,
            policy_line(policy),
        )
        # No await since then, so this worker receives every later policy as well.
        self._processes.add(process)
        return process

    async def _starts(self, process: asyncio.subprocess.Process) -> str:
        """Wait until the worker is ready. Return "", or the reason why it is not ready."""
        assert process.stdout is not None, "it is a pipe"  # noqa: S101 - for the type checker
        read = asyncio.create_task(process.stdout.readline())
        try:
            async with asyncio.timeout(READY_TIMEOUT_SECONDS):
                ready = await self._unless_stopped(read) and read.result() == READY
        except TimeoutError:
            # It may have logged nothing.
            seconds = READY_TIMEOUT_SECONDS
            return f"was not ready within {seconds:g} s: this machine is too busy; start again"
        return "" if ready else "failed to start; see its log above"

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        """Stop a worker: SIGTERM first, and SIGKILL after the drain and the grace period."""
        stop_seconds = self._settings.drain_seconds + self._settings.grace_seconds
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(stop_seconds + STOP_MARGIN_SECONDS):
                    await process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    async def _keep_postgres(self) -> None:
        """Restart the embedded Postgres when it exits, until cancelled."""
        while self._postgres is not None:
            if (code := self._postgres.poll()) is not None and not self._stop.is_set():
                self._log.error("embedded Postgres exited", exit_code=code)
                try:
                    # Blocks the loop, because it must run on the main thread. A policy change has
                    # to wait. But without Postgres, verifies stop after one lease anyway.
                    self._postgres.start()
                    self._log.info("embedded Postgres restarted")
                except (EmbeddedError, OSError) as error:
                    self._log.error("embedded Postgres failed to start", error=str(error))
                    await asyncio.sleep(RESTART_SECONDS_MAX)
            await asyncio.sleep(POLL_SECONDS)

    async def _unless_stopped(self, task: "asyncio.Task[Any]") -> bool:
        """Wait for `task` or the stop. Return whether the task ended; raise what it raised."""
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            if not task.done():
                task.cancel()
        if task.done() and not task.cancelled():
            task.result()
            return True
        return False

    def _report_serving(self) -> None:
        """Log the addresses, and print them for people, with examples.

        Not with LOG_FORMAT=json: containers merge stdout and stderr, and the text is not JSON.
        """
        settings = self._settings
        self._log.info("serving", address=self._listen, tls_address=self._tls_listen)
        if settings.log_format == "json":
            return
        database = "your Postgres" if self._postgres is None else f"data in {settings.data_dir}"
        logs.say(welcome(settings, self._listen, self._tls_listen, database) + "\n")


def _check_files(settings: Settings) -> str | None:
    """Check the files for the workers, and return the policy's text. Raises StartError."""
    policy = None
    if settings.policy is not None:
        try:
            policy = read_text(settings.policy)
            parse(policy)
        except PolicyError as error:
            raise StartError(f"{PREFIX}POLICY: {settings.policy}: {error}") from None
    if settings.tls_certificate is not None and settings.tls_key is not None:
        certificates = tls.Certificates(
            settings.tls_certificate, settings.tls_key, settings.tls_client_ca
        )
        try:
            certificates.read()
        except tls.TlsError as error:
            raise StartError(str(error)) from None
    return policy


async def _all_set(events: list[asyncio.Event]) -> None:
    for event in events:
        await event.wait()


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Make SIGTERM act like Ctrl-C until the event loop takes over."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
