"""Start everything in order, keep it up, stop it in order: Postgres, schema, workers.

The supervisor serves nothing itself, so there is little that could make it fail. Workers are
processes of their own from the start, never forks: gRPC does not survive a fork.

A worker knows what the supervisor hands it, and reads neither the environment nor `.env` nor the
policy file. If each worker followed the policy file by itself, one could find a policy that stands
there too shortly for another one, or for one that is just starting; with a broken file after it,
they would go by different policies for good, and a right that was taken away would be back with
some. So the supervisor alone reads it, and hands the same ones in the same order to all workers,
and what it has handed over last to each that starts.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from pydantic import SecretStr

from latchkey_service import log, peppers, tls
from latchkey_service.access.policy import PolicyError, parse
from latchkey_service.access.policy_file import SIZE_MAX, PolicyFile, read_text
from latchkey_service.addresses import AddressError, reserved
from latchkey_service.config import PREFIX, READY, Settings, to_json
from latchkey_service.embedded import EmbeddedError, EmbeddedPostgres
from latchkey_service.enrolment import enrol
from latchkey_service.errors import StoreUnavailable
from latchkey_service.exposure import transport_of
from latchkey_service.migrate import MigrationError, bundled, migrate
from latchkey_service.peppers import PepperFileError
from latchkey_service.store import Store

__all__ = ["run"]

# A worker imports, connects and listens in about half a second.
READY_TIMEOUT_SECONDS = 30.0
# A worker that dies at once is not started in a tight loop.
RESTART_SECONDS_MIN, RESTART_SECONDS_MAX = 0.1, 5.0
# A worker that has stood this long was well: the next death starts from the short delay again.
HEALTHY_SECONDS = 10.0
# Past the grace for calls, for closing connections.
STOP_MARGIN_SECONDS = 5.0
POLL_SECONDS = 0.2
# What a worker has not taken of what it was handed, some policies of the longest. One that is so
# far behind goes by a policy of long ago, and may have rights in force that were taken away.
BACKLOG_MAX_BYTES = 8 * SIZE_MAX


class StartError(Exception):
    """The service cannot start. The message says why and what to do."""


class _NotStarted(Exception):
    """No worker is to be had, which as a rule will pass: where memory is short, it may be why the
    last one ended."""


def run(settings: Settings) -> int:
    """Run the service until SIGINT or SIGTERM. Returns the exit code."""
    log.configure(log.form(settings.log_format), settings.log_level)
    postgres: EmbeddedPostgres | None = None
    try:
        # Before Postgres is started: who has made a mistake is told at once.
        policy = _checked_files(settings)
        if settings.database_url is None:
            postgres = EmbeddedPostgres(settings.data_dir)
            # On the main thread, before any other: see embedded.py.
            with _signals_end_it():
                database_url = postgres.start()
        else:
            database_url = settings.database_url.get_secret_value()
        with (
            reserved(settings.listen) as listen,
            reserved(settings.tls_listen, "TLS_LISTEN") as tls_listen,
        ):
            supervisor = _Supervisor(settings, database_url, listen, tls_listen, postgres, policy)
            return asyncio.run(_uninterrupted_afterwards(supervisor))
    except (
        AddressError,
        EmbeddedError,
        MigrationError,
        PepperFileError,
        StartError,
        StoreUnavailable,
    ) as error:
        print(f"latchkey: cannot start: {error}", file=sys.stderr)  # noqa: T201 - for a person
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        # For good, as nothing comes after: who presses Ctrl-C again must not cut the database's
        # shutdown short.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if postgres is not None:
            postgres.stop()


async def _uninterrupted_afterwards(supervisor: "_Supervisor") -> int:
    """Run a supervisor; when it has ended, hold back Ctrl-C until `run` has seen to the rest.

    The event loop's end gives Ctrl-C back its usual meaning, and one that comes before it can be
    ignored would end all with a traceback.
    """
    try:
        return await supervisor.run()
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})


class _Supervisor:
    """Keeps `settings.workers` workers up."""

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
        # As they were at the start. Whatever has become of `.env` since is for the next start: it
        # was not checked, and workers that differ would be no service.
        self._handed = settings.model_copy(
            update={
                "database_url": SecretStr(database_url),
                "listen": listen,
                "tls_listen": tls_listen,
                "data_dir": settings.data_dir,
                "log_format": log.form(settings.log_format),
            }
        )
        self._listen = listen
        self._tls_listen = tls_listen
        self._postgres = postgres
        self._peppers = b""
        self._policy_file: PolicyFile | None = None
        if settings.policy is not None and policy is not None:
            self._policy_file = PolicyFile(settings.policy, policy, self._hand_policy)
        # Those that start and those that stop are among them: they may answer calls.
        self._processes: set[asyncio.subprocess.Process] = set()
        self._stop = asyncio.Event()
        self._log = log.logger()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop.set)
        if self._policy_file is not None:
            # Else it ends us, as when a terminal is closed: there is nothing to read again.
            loop.add_signal_handler(signal.SIGHUP, self._policy_file.reload)
        policy_file = self._policy_file
        # From now on: to prepare may take as long as the database is waited for.
        following = [] if policy_file is None else [asyncio.create_task(policy_file.follow())]
        prepare = asyncio.create_task(self._prepare())
        try:
            if not await self._unless_stopped(prepare):
                return 0
            return await self._serve(following)
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)

    async def _serve(self, following: "list[asyncio.Task[None]]") -> int:
        ready = [asyncio.Event() for _ in range(self._settings.workers)]
        workers = [asyncio.create_task(self._keep(number, up)) for number, up in enumerate(ready)]
        keeper = asyncio.create_task(self._keep_postgres())
        try:
            all_up = asyncio.create_task(_all_set(ready))
            # None of these ends before the stop, unless by an error.
            parts = [*workers, *following]
            await asyncio.wait({all_up, *parts}, return_when=asyncio.FIRST_COMPLETED)
            if all_up.done():
                self._welcome()
                await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            all_up.cancel()
            self._stop.set()
            results = await asyncio.gather(*workers, return_exceptions=True)
        finally:
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
        """Bring schema and peppers in order. Raises what `run` reports."""
        for migration in await migrate(self._database_url, bundled(), self._settings.pooler):
            self._log.info("migrated", version=migration.version, name=migration.name)
        store = await Store.open(self._database_url, self._settings.pooler)
        try:
            keyring = await enrol(
                store,
                self._settings.pepper_path,
                named=self._settings.pepper_file is not None,
                shared=self._postgres is None,
            )
        finally:
            await store.close()
        self._peppers = peppers.render(keyring).encode()

    def _hand_policy(self, text: str) -> None:
        """Hand all workers a policy that is right. Each says when it is in force."""
        for process in self._processes:
            if _hand(process, _policy_line(text)) > BACKLOG_MAX_BYTES:
                self._log.error("worker takes no policies: killing it", pid=process.pid)
                with contextlib.suppress(ProcessLookupError):
                    process.kill()

    async def _keep(self, number: int, ready: asyncio.Event) -> None:
        """Run worker `number`, again when it dies, until stopped."""
        loop = asyncio.get_running_loop()
        delay = RESTART_SECONDS_MIN
        while not self._stop.is_set():
            started = loop.time()
            end: dict[str, object]
            try:
                end = {"exit_code": await self._run_worker(number, ready)}
            except _NotStarted as error:
                # The other workers go on.
                end = {"not_started": str(error)}
                if not ready.is_set():
                    raise StartError(f"worker {number} cannot be started: {error}") from error
            if self._stop.is_set():
                return
            if loop.time() - started > HEALTHY_SECONDS:
                delay = RESTART_SECONDS_MIN
            self._log.error("worker died", worker=number, restart_seconds=delay, **end)
            await self._unless_stopped(asyncio.create_task(asyncio.sleep(delay)))
            delay = min(delay * 2, RESTART_SECONDS_MAX)

    async def _run_worker(self, number: int, ready: asyncio.Event) -> int | None:
        """Run a worker until it ends or we stop; return its exit code.

        Raises _NotStarted when there is none to be had, StartError when the first does not come up.
        """
        with _folder(self._settings) as folder:
            try:
                process = await self._spawn(folder)
            except (OSError, RuntimeError, MemoryError) as error:
                # No process, pipe, file, memory, or thread to wait for it (Python 3.11).
                raise _NotStarted(str(error) or type(error).__name__) from error
            try:
                if await self._comes_up(process):
                    ready.set()
                    self._log.info("worker up", worker=number, pid=process.pid)
                    await self._unless_stopped(asyncio.create_task(process.wait()))
                elif not ready.is_set() and not self._stop.is_set():
                    raise StartError(f"worker {number} did not come up; its log says why")
            finally:
                await self._end(process)
                self._processes.discard(process)
            return process.returncode

    async def _spawn(self, folder: str | None) -> asyncio.subprocess.Process:
        """Start a worker whose temporary files are in this folder."""
        # grpcio's core writes a line for each of some frames, which clients send by the thousand.
        environment = {"GRPC_VERBOSITY": "ERROR", **os.environ}
        if folder is not None:
            environment["TMPDIR"] = folder
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            # Without the current folder on the path: a stray asyncpg.py there must not be loaded.
            "-P",
            "-m",
            "latchkey_service",
            "worker",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            # Ctrl-C goes to the supervisor alone, which stops the workers in order.
            start_new_session=True,
        )
        # The peppers that were checked, and not the file: by now it may hold others, and a worker
        # that lacked one would take live tokens for made-up ones.
        policy = None if self._policy_file is None else self._policy_file.text
        _hand(process, to_json(self._handed).encode("ascii"), self._peppers, _policy_line(policy))
        # In one go with that: what is right from now on is handed to it as well.
        self._processes.add(process)
        return process

    async def _comes_up(self, process: asyncio.subprocess.Process) -> bool:
        """Wait until the worker says that it is ready; False if it ends, or we stop, first."""
        assert process.stdout is not None, "it is a pipe"  # noqa: S101 - for the type checker
        read = asyncio.create_task(process.stdout.readline())
        try:
            async with asyncio.timeout(READY_TIMEOUT_SECONDS):
                return await self._unless_stopped(read) and read.result() == READY
        except TimeoutError:
            return False

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        """Stop a worker: politely, and after its grace for good."""
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(self._settings.grace_seconds + STOP_MARGIN_SECONDS):
                    await process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    async def _keep_postgres(self) -> None:
        """Start the embedded Postgres again when it ends. Ends when cancelled."""
        while self._postgres is not None:
            if (code := self._postgres.poll()) is not None and not self._stop.is_set():
                self._log.error("embedded Postgres ended", exit_code=code)
                try:
                    # Blocks the loop, as it must be the main thread. A change of the policy waits,
                    # but without Postgres no verify is answered for longer than a lease lasts.
                    self._postgres.start()
                    self._log.info("embedded Postgres is back")
                except (EmbeddedError, OSError) as error:
                    self._log.error("embedded Postgres does not start", error=str(error))
                    await asyncio.sleep(RESTART_SECONDS_MAX)
            await asyncio.sleep(POLL_SECONDS)

    async def _unless_stopped(self, task: "asyncio.Task[Any]") -> bool:
        """Wait for `task` or the stop; tell whether the task ended. Raises what it raised."""
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

    def _welcome(self) -> None:
        settings = self._settings
        database = "your Postgres" if self._postgres is None else f"data in {settings.data_dir}"
        plural = "" if settings.workers == 1 else "s"
        address = self._listen
        if address.startswith("unix:"):
            address = "-unix " + address.removeprefix("unix:")
        encrypted = f"With TLS it serves on {self._tls_listen}.\n" if self._tls_listen else ""
        who = "" if self._policy_file is None else """-H "authorization: Bearer $CREDENTIAL" """
        print(  # noqa: T201 - for a person
            f"\nLatchkey serves on {self._listen} ({settings.workers} worker{plural}, {database})."
            f" Ctrl-C stops it.\n{encrypted}\nTry it:\n"
            f"""  grpcurl -plaintext {who}-d '{{"account_id": "acme", "name": "first", """
            f""""scope": "SCOPE_READ"}}' \\\n    {address} latchkey.v1.TokenService/Create\n""",
            flush=True,
        )


def _checked_files(settings: Settings) -> str | None:
    """Check what workers will read, and return the policy. Raises StartError."""
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


@contextlib.contextmanager
def _folder(settings: Settings) -> Iterator[str | None]:
    """Make a folder for a worker's temporary files, of which `native` has one, its socket. What a
    worker leaves there when it is killed goes with it. Raises _NotStarted."""
    if transport_of(settings) != "native":
        yield None
        return
    try:
        folder = tempfile.TemporaryDirectory(prefix="lk-", ignore_cleanup_errors=True)
    except OSError as error:
        raise _NotStarted(str(error)) from error
    with folder as path:
        yield path


def _hand(process: asyncio.subprocess.Process, *lines: bytes) -> int:
    """Give a worker lines to read, whenever it does. Return how many bytes it has yet to take."""
    assert process.stdin is not None, "it is a pipe"  # noqa: S101 - for the type checker
    process.stdin.writelines(lines)
    return process.stdin.transport.get_write_buffer_size()


def _policy_line(text: str | None) -> bytes:
    return json.dumps(text, ensure_ascii=False).encode() + b"\n"


async def _all_set(events: list[asyncio.Event]) -> None:
    for event in events:
        await event.wait()


@contextlib.contextmanager
def _signals_end_it() -> Iterator[None]:
    """Make SIGTERM what Ctrl-C is, until the event loop takes over."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
