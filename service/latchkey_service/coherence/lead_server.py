"""Serves the siblings of a host over a private UNIX socket.

Owns the socket, its connections and what a sibling reports for people. The rules are in
`host_lead`. The directory of the socket admits only the account of the workers.
"""

import asyncio
import contextlib
import math
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from latchkey_coherence.verdict_cache import Position

from latchkey_service.coherence.host_lead import HostLead, Sibling, UnaskedLog
from latchkey_service.coherence.host_messages import (
    LINE_BYTES_MAX,
    decode,
    encode,
    log_out,
    news_of_log,
)
from latchkey_service.coherence.lease_renewer import LeaseRenewer
from latchkey_service.coherence.log import Server
from latchkey_service.coherence.verifier_table import SiblingReport
from latchkey_service.errors import LatchkeyError
from latchkey_service.settings.logs import logger

__all__ = ["LeadServer"]

# While a request waits for Postgres, the sibling hears this often that the lead is alive, in parts
# of a lease. Far below the silence after which a sibling takes its own row.
ALIVE_LEASES = 1 / 24
# As long as a statement may take, and a connection before it.
REQUEST_SECONDS_MAX = 3.0
# In leases: how much longer the lead's lease must be for its siblings to hear of it. A lead that
# renews in order to acknowledge has a lease that is only a little longer, and they would all ask.
LONGER_LEASES = 1 / 4
# Questions that need no lease.
WITHOUT_LEASE = ("hello", "release")
# Far above the time between two looks at the stream.
STOP_SECONDS_MAX = 0.5
# A sibling that does not read gets no more news.
UNREAD_BYTES_MAX = 64 * 1024


class _Connection:
    """A sibling, its connection, and its last report."""

    def __init__(self, sibling: Sibling, writer: asyncio.StreamWriter) -> None:
        self.sibling = sibling
        self.writer = writer
        self.identity: dict[str, Any] = {}
        self.report: dict[str, Any] = {}


class LeadServer:
    """Answers the siblings. Event loop only."""

    def __init__(
        self,
        path: str,
        rules: HostLead,
        renewer: LeaseRenewer,
        clock: Callable[[], float],
        own_id: str,
        database_host: Callable[[], str],
        on_released: Callable[[], None],
    ) -> None:
        self._path = path
        self._rules = rules
        self._renewer = renewer
        self._clock = clock
        self._own_id = own_id
        self._database_host = database_host
        # Called when a sibling has released its lease.
        self._on_released = on_released
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._announced: tuple[float, bool] = (0.0, False)
        self._log = logger()

    async def start(self) -> None:
        """Listen. Logs failures: siblings then have rows in Postgres."""
        try:
            self._server = await asyncio.start_unix_server(
                self._accept, self._path, limit=LINE_BYTES_MAX
            )
            # Siblings that have given up root must be able to connect. The folder protects it.
            Path(self._path).chmod(0o777)  # noqa: ASYNC240 - takes microseconds
        except OSError as error:
            self._log.warning("the lease is not shared", socket=self._path, error=str(error))

    def close_to_siblings(self) -> None:
        """Ask the siblings to take their own rows, because this process will stop.

        Their leases stay on record until they have ended or are released.
        """
        self._rules.closing = True
        for connection in self._connections:
            self._push(connection, encode({"news": "closing"}))

    async def stop(self) -> None:
        """Close all connections."""
        if self._server is None:
            return
        self._server.close()
        # Not cancelled: Python 3.11 logs the cancellation of such a task as an error. Each ends
        # with its stream, or when the request that it works on finds the stream closed.
        for writer in self._writers:
            writer.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_SECONDS_MAX)
        with contextlib.suppress(OSError):
            Path(self._path).unlink()  # noqa: ASYNC240 - takes microseconds

    def on_news(self, changed: bool) -> None:  # noqa: FBT001 - called back
        """Send the siblings what is new in the log, or that the lease is longer."""
        ends, in_doubt = self._renewer.state.lease_ends, self._renewer.in_doubt()
        if not changed:
            longer = ends - self._announced[0] >= self._renewer.state.lease_seconds * LONGER_LEASES
            if not longer and in_doubt == self._announced[1]:
                return
            self._announced = (ends, in_doubt)
            line = encode({"news": "lease"})
            for connection in self._connections:
                self._push(connection, line)
            return
        # Mostly the same for all siblings.
        lines: dict[UnaskedLog | None, bytes] = {}
        for connection in self._connections:
            unasked = self._rules.unasked_log(connection.sibling)
            if unasked not in lines:
                lines[unasked] = encode(news_of_log(unasked))
            self._push(connection, lines[unasked])

    def reports(self) -> list[SiblingReport]:
        """Return the siblings with a lease, for people."""
        now, ends = self._clock(), self._renewer.state.lease_ends
        return [
            SiblingReport(
                **connection.identity,
                **connection.report,
                acknowledged_revision=lease.confirmed,
                behind_seconds=round(max(0.0, ends - lease.ends), 3),
            )
            for connection in self._connections
            if (lease := connection.sibling.lease).ends > now and connection.report
        ]

    def counts(self) -> tuple[int, int]:
        """Return how many clients of siblings have confirmed, and how many were outwaited."""
        reports = [c.report for c in self._connections if c.report]
        return (
            sum(report["clients_confirmed"] for report in reports),
            sum(report["clients_outwaited"] for report in reports),
        )

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "the server runs it in a task"  # noqa: S101 - for the type checker
        self._tasks.add(task)
        self._writers.add(writer)
        connection = _Connection(Sibling(), writer)
        try:
            while line := await reader.readline():
                request = decode(line)
                answer = await self._respond(connection, request)
                if writer.is_closing():
                    break
                writer.write(encode(answer))
                await writer.drain()
        except (ValueError, KeyError, TypeError, OSError) as error:
            self._log.warning("sibling dropped", error=type(error).__name__)
        finally:
            # Its lease stays on record until it has ended.
            self._tasks.discard(task)
            self._writers.discard(writer)
            self._connections.discard(connection)
            writer.close()

    async def _alive_until(
        self, work: Coroutine[Any, Any, object], writer: asyncio.StreamWriter
    ) -> None:
        """Await the work, and report meanwhile that this process does it."""
        task = asyncio.create_task(work, name="sibling request")
        try:
            while True:
                seconds = self._renewer.state.lease_seconds * ALIVE_LEASES
                done, _ = await asyncio.wait({task}, timeout=seconds)
                if done:
                    task.result()
                    return
                if writer.is_closing():
                    # The sibling has gone, or this process stops.
                    raise ConnectionResetError
                writer.write(encode({"alive": 1}))
        finally:
            task.cancel()

    async def _respond(self, connection: _Connection, request: dict[str, Any]) -> dict[str, Any]:
        try:
            if not self._answerable(request):
                await self._alive_until(self._make_answerable(request), connection.writer)
            return self._answer(connection, request)
        except LatchkeyError:
            return {"unavailable": True}

    def _answerable(self, request: dict[str, Any]) -> bool:
        """Return whether this process can answer without Postgres."""
        if request["kind"] in WITHOUT_LEASE or self._rules.closing:
            return True
        return self._rules.ready(self._clock()) and self._to_read(request) is None

    async def _make_answerable(self, request: dict[str, Any]) -> None:
        """Wait for the lease, and read the log if a sibling may know more than this process.

        Raises as `LeaseRenewer.wait_for_lease` and `read_log_to`.
        """
        deadline = self._clock() + REQUEST_SECONDS_MAX
        if not self._rules.ready(self._clock()):
            await self._renewer.wait_for_lease(deadline)
        if (revision := self._to_read(request)) is not None:
            await self._renewer.read_log_to(revision, deadline)

    def _to_read(self, request: dict[str, Any]) -> float | None:
        """Return the revision that a sibling may know and this process may not, if any.

        A sibling asks for the log when it knows of a new revision, but not of which: one that this
        process has read since may be an earlier one. Infinite, so the read begins after the
        question.
        """
        if request["kind"] == "register":
            return None
        if request["kind"] == "log":
            return math.inf
        applied = Position(*request["applied"])
        return applied.revision if self._rules.behind(applied) else None

    def _answer(self, connection: _Connection, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer. Nothing is awaited, so the lease that is recorded is what is sent."""
        sibling, kind = connection.sibling, request["kind"]
        if kind == "hello":
            connection.identity = request["identity"]
            sibling.lease.client = f"process {request['identity']['process_id']} of this host"
            self._connections.add(connection)
            return {"ok": True}
        if kind == "release":
            self._rules.release(sibling)
            self._on_released()
            self._renewer.wake_to_acknowledge()
            return {"ok": True}
        if self._rules.closing:
            return {"closing": True}
        return self._answer_under_lease(connection, request)

    def _answer_under_lease(
        self, connection: _Connection, request: dict[str, Any]
    ) -> dict[str, Any]:
        rules, sibling, renewer = self._rules, connection.sibling, self._renewer
        if request["kind"] == "log":
            return {"log": log_out(rules.log_after(sibling, Position(*request["applied"])))}
        if not rules.ready(self._clock()):
            return {"unavailable": True}
        if request["kind"] == "register":
            return {"registration": rules.register(sibling, acknowledge=request["acknowledge"])}
        applied = Position(*request["applied"])
        if request["kind"] == "adopt":
            adopted = rules.adopt(
                sibling,
                applied,
                request["acknowledged"],
                request["ends"],
                Server(*request["server"]),
                self._clock(),
            )
            if adopted:
                # For people: the row counts this sibling from now on.
                renewer.renew_now()
            return {"adopted": adopted, "row": self._row()}
        connection.report, leases = request["report"], renewer.state.client_leases
        confirmed, pinned_until = sibling.lease.confirmed, leases.pinned_until
        renewed, log, ends = rules.renew(sibling, applied, request["acknowledged"])
        if confirmed != sibling.lease.confirmed and (
            # Not for each sibling: a deletion waits for the last one.
            renewer.state.acknowledgeable(self._clock()) > renewer.state.acknowledged
            or leases.pinned_until < pinned_until
        ):
            renewer.wake_to_acknowledge()
        return {
            "renewed": renewed,
            "log": log_out(log),
            "ends": ends,
            "row": self._row(),
            "in_doubt": renewer.in_doubt(),
            "database_host": self._database_host(),
        }

    def _row(self) -> tuple[str, int]:
        return self._own_id, self._rules.incarnation()

    def _push(self, connection: _Connection, line: bytes) -> None:
        writer = connection.writer
        # uvloop raises RuntimeError for a write after the other end has closed.
        if not writer.is_closing() and (
            writer.transport.get_write_buffer_size() < UNREAD_BYTES_MAX
        ):
            writer.write(line)
