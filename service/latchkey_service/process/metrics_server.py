"""Serves the metrics of all workers on one address, for Prometheus.

The supervisor serves them: a scrape must not depend on which worker takes the connection. It asks
each worker over the pipes that it already has. Prometheus-client's own mode for several processes
was rejected. It writes each increment to a mapped file, so it would cost every Verify something;
the files of dead workers remain on the disk; and gauges of dead workers remain in the sum.

Each series has the label `worker`, the number of the worker. A restarted worker begins at 0 under
the same label, which Prometheus recognises as a restart. So apply `rate` first, and `sum` then.
"""

import asyncio
import contextlib
import json
import socket
import socketserver
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from latchkey_service.process.metric_families import SUPERVISOR, Families
from latchkey_service.process.port_reservation import AddressError
from latchkey_service.process.worker_metrics import process_metrics
from latchkey_service.settings.logs import logger
from latchkey_service.settings.settings import PREFIX

__all__ = ["COLLECT", "WorkerReports", "answer_line", "serve_metrics"]

# The line that asks a worker for its metrics. Policies, which use the same pipe, are JSON.
COLLECT: Final = b"metrics\n"
# A worker answers within milliseconds. One that takes longer is reported as down.
ANSWER_SECONDS: Final = 2.0
# The supervisor's event loop may be blocked while it restarts Postgres; Prometheus gives up after
# ten seconds by default.
SCRAPE_SECONDS: Final = 8.0
# Longest pause between two packets of a request.
REQUEST_SECONDS: Final = 5.0
# Requests in progress. A further one ends the oldest, so slow clients cannot keep Prometheus out.
REQUESTS_MAX: Final = 8
POLL_SECONDS: Final = 0.2


class WorkerReports:
    """Asks the workers for their metrics. Event loop only."""

    def __init__(self, workers: int, version: str, restarts: Counter[object]) -> None:
        self._workers = workers
        self._version = version
        self._restarts = restarts
        self._ready: dict[int, asyncio.subprocess.Process] = {}
        # Requests that a worker has not answered. Concurrent scrapes share them, so a worker that
        # hangs has one request waiting at most.
        self._asked: dict[int, asyncio.Future[Any]] = {}

    async def follow(self, worker: int, process: asyncio.subprocess.Process) -> None:
        """Read what a worker writes until it ends."""
        assert process.stdout is not None, "it is a pipe"  # noqa: S101 - for the type checker
        self._ready[worker] = process
        try:
            while True:
                try:
                    line = await process.stdout.readline()
                except ValueError:
                    continue  # not one of our lines: longer than any answer
                if not line:
                    return
                future = self._asked.pop(worker, None)
                if future is not None and not future.done():
                    with contextlib.suppress(ValueError):  # printed by a library
                        future.set_result(json.loads(line))
        finally:
            del self._ready[worker]
            if (left := self._asked.pop(worker, None)) is not None:
                left.cancel()

    async def collect(self) -> list[Metric]:
        """Return the metrics of the supervisor and of the workers that answer in time."""
        found = Families()
        found.add("latchkey_build_info", 1, self._version)
        found.add("latchkey_workers", self._workers)
        for reason, number in self._restarts.items():
            found.add("latchkey_worker_restarts", number, str(reason))
        own = Families()
        process_metrics(own)
        reports: dict[str, Any] = {SUPERVISOR: own.to_plain()}
        numbers = range(self._workers)
        for number, report in zip(
            numbers, await asyncio.gather(*map(self._ask, numbers)), strict=True
        ):
            up = Families()
            up.add("latchkey_worker_up", float(report is not None))
            found.add_all(up.to_plain(), str(number))
            reports[str(number)] = report or ()
        for worker, report in reports.items():
            try:
                found.add_all(report, worker)
            except (KeyError, TypeError, ValueError) as error:
                # Not a report: a library may have printed a line.
                logger().warning("metrics of a worker lost", worker=worker, error=repr(error))
        return found.metrics()

    async def _ask(self, worker: int) -> Any:
        """Return a worker's report, or None if it does not answer."""
        process = self._ready.get(worker)
        if process is None or process.stdin is None:
            return None
        future = self._asked.get(worker)
        if future is None:
            future = self._asked[worker] = asyncio.get_running_loop().create_future()
            process.stdin.write(COLLECT)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                # Shielded, because other scrapes wait for it too.
                return await asyncio.shield(future)
        except (TimeoutError, asyncio.CancelledError):
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            return None


def answer_line(found: Families) -> bytes:
    """Return a worker's answer to COLLECT."""
    return json.dumps(found.to_plain()).encode("ascii") + b"\n"


@contextlib.contextmanager
def serve_metrics(listen: str | None, reports: WorkerReports) -> Iterator[str | None]:
    """Serve the metrics on an address from a thread. Yields the address with its actual port.

    Call it on the event loop of `reports`. Raises AddressError.
    """
    if listen is None:
        yield None
        return
    host, _, port = listen.rpartition(":")
    registry = CollectorRegistry()
    registry.register(_FromLoop(reports, asyncio.get_running_loop()))
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        server = _Server(found[0][0], found[0][4])
    except OSError as error:
        raise AddressError(
            f"cannot serve metrics on {listen}: {error.strerror}. {PREFIX}METRICS_LISTEN chooses "
            "another address"
        ) from None
    server.set_app(_logging_failures(make_wsgi_app(registry)))
    thread = threading.Thread(
        target=server.serve_forever, args=(POLL_SECONDS,), name="metrics", daemon=True
    )
    thread.start()
    try:
        yield f"{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _FromLoop(Collector):
    """Collects on the event loop, for a thread that serves a request."""

    def __init__(self, reports: WorkerReports, loop: asyncio.AbstractEventLoop) -> None:
        self._reports = reports
        self._loop = loop

    def collect(self) -> Iterable[Metric]:
        future = asyncio.run_coroutine_threadsafe(self._reports.collect(), self._loop)
        try:
            return future.result(SCRAPE_SECONDS)
        finally:
            future.cancel()


class _Handler(WSGIRequestHandler):
    """Serves one request, and logs nothing: Prometheus sends one every few seconds."""

    timeout = REQUEST_SECONDS

    def log_message(self, *_: Any) -> None:
        pass


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """Serves each request in a thread."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, family: int, address: Any) -> None:
        self.address_family = family
        self._requests: dict[Any, None] = {}
        self._lock = threading.Lock()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # The inherited method asks DNS for the host's name, which may take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._requests[request] = None
            oldest = next(iter(self._requests)) if len(self._requests) > REQUESTS_MAX else None
        if oldest is not None:
            with contextlib.suppress(OSError):  # it has ended already
                oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._requests.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, *_: Any) -> None:
        """Do nothing: the client left or was too slow."""


def _logging_failures(app: Callable[..., Any]) -> Callable[..., Any]:
    """Return an application that logs its failures, in place of a traceback on stderr."""

    def logging(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        try:
            return app(environ, start_response)
        except Exception as error:  # noqa: BLE001 - the last place before the server
            logger().error("metrics not collected", error=type(error).__name__)
            start_response("503 Service Unavailable", [("Content-Type", "text/plain")])
            return [b"The metrics could not be collected; see the log.\n"]

    return logging
