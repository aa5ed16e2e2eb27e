"""Deletions: the time until a token is dead everywhere, and the cost of watching for them.

For deletions, workers, clients, Postgres and the caller share the same two cores, as the targets
assume; a Delete waits for all of them.
"""

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Iterator

import grpc
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import status_service_pb2_grpc as status_pb_grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.benchmarks import processes
from tests.benchmarks.coherence_figures import Bench, Figure
from tests.benchmarks.processes import Child, Server
from tests.benchmarks.seed import ACCOUNT

__all__ = ["DELETES_MAX", "deletes", "idle", "separate_channels"]

# Workers, and the number of watching clients over all of them.
FLEETS = ((1, (1, 50, 200)), (2, (10,)), (4, (1, 50, 200)))
QUICK_FLEETS = ((2, (10,)), (4, (50,)))
# During its first deletions a server creates its connections and plans.
WARM_UP = 10
SAMPLES, QUICK_SAMPLES = 200, 40
FLEET_SECONDS_MAX = 15.0
# All tokens that the run may delete.
DELETES_MAX = 3_000
# p50 and p99 in ms, by workers and clients.
WANTED: dict[tuple[int, int], tuple[float, float | None]] = {(2, 10): (15, 60), (4, 50): (80, None)}
CALL_SECONDS_MAX = 20.0
CLIENTS_SECONDS_MAX = 60.0
# Clients per process.
CLIENTS_MAX = 250
# Connections that Deletes use in turn: each leads to one worker.
CHANNELS = 4
LEASE_SECONDS = 3.0
FROZEN_EXTRA_SECONDS = 0.5
# A client always holds at least a third of a lease.
HELD_UP_SECONDS_MIN = LEASE_SECONDS / 6
POLL_SECONDS = 0.05
IDLE_SETTLE_SECONDS = 2.0
IDLE_SHARE_MAX = 0.30


def deletes(bench: Bench) -> Iterator[Figure]:
    """Delete with these numbers of workers and clients, one after another, and with a client that
    hangs."""
    ids = (token_id for _, token_id in bench.seeded["deletes"].secrets)
    with processes.spread(bench.postmaster, _both(bench)):
        for workers, fleets in QUICK_FLEETS if bench.quick else FLEETS:
            with _server(bench, "deletes", workers, _both(bench)) as server:
                for clients in fleets:
                    if time.monotonic() < bench.give_up:
                        yield from _healthy(bench, server, clients, ids)
                if workers == 2:
                    yield from _frozen(bench, server, ids)


def idle(bench: Bench) -> Iterator[Figure]:
    """Measure the cost of watching clients for a worker while nothing changes."""
    clients, seconds = (100, 2.0) if bench.quick else (1_000, 8.0)
    with (
        _server(bench, "small", 1, {bench.cores.server}) as server,
        _watching(bench, server, clients, min(clients, CLIENTS_MAX), {bench.cores.load}),
    ):
        time.sleep(IDLE_SETTLE_SECONDS)
        shares = []
        for _ in range(3):
            began, cpu = time.monotonic(), processes.cpu_seconds(server.pid)
            time.sleep(seconds / 3)
            used = processes.cpu_seconds(server.pid) - cpu
            shares.append(used / (time.monotonic() - began))
    yield Figure.median(
        f"{clients:,} clients watch a worker, nothing changes",
        "of a core",
        shares,
        at_most=IDLE_SHARE_MAX,
    )


def _healthy(bench: Bench, server: Server, clients: int, ids: Iterator[str]) -> Iterator[Figure]:
    # Several per process, and several processes.
    each = 1 if clients == 1 else max(5, clients // 4)
    workers = len(server.workers)
    samples = QUICK_SAMPLES if bench.quick else SAMPLES
    took: list[float] = []
    with _watching(bench, server, clients, each, _both(bench)), _stubs(server) as stubs:
        give_up = time.monotonic() + FLEET_SECONDS_MAX
        for number in range(WARM_UP + samples):
            if time.monotonic() > give_up and took:
                break
            seconds, receipt = _delete(stubs[number % CHANNELS], next(ids))
            if receipt.verifiers_acknowledged + receipt.verifiers_outwaited < workers:
                raise RuntimeError(f"a Delete has not waited for {workers} workers: {receipt}")
            if number >= WARM_UP:
                took.append(seconds * 1e3)
    p50, p99 = WANTED.get((workers, clients), (None, None))
    name = f"Delete, {workers} worker{'s' * (workers > 1)}, {clients} client{'s' * (clients > 1)}"
    yield Figure.percentile(f"{name}, p50", "ms", took, 0.50, at_most=p50)
    yield Figure.percentile(f"{name}, p99", "ms", took, 0.99, at_most=p99)


def _frozen(bench: Bench, server: Server, ids: Iterator[str]) -> Iterator[Figure]:
    """Delete while one client does not respond, and then while one worker does not."""
    samples = 1 if bench.quick else 3
    most = (LEASE_SECONDS + FROZEN_EXTRA_SECONDS) * 1e3
    took = []
    with _watching(bench, server, 2, 1, _both(bench)) as children, _stubs(server) as stubs:
        child = children[0]
        for _ in range(samples):
            child.freeze()
            seconds, _receipt = _delete(stubs[0], next(ids))
            child.thaw()
            if seconds < HELD_UP_SECONDS_MIN:
                raise RuntimeError("a Delete has not waited for a client that was frozen")
            took.append(seconds * 1e3)
            _all_watch([child])
    yield _longest("Delete, 2 workers, one client frozen, longest", took, most)
    took = []
    with _stubs(server) as stubs:
        other = _other_worker(server, stubs[0])
        for _ in range(samples):
            os.kill(other, signal.SIGSTOP)
            try:
                seconds, receipt = _delete(stubs[0], next(ids))
            finally:
                os.kill(other, signal.SIGCONT)
            if receipt.verifiers_outwaited != 1:
                raise RuntimeError(f"a frozen worker was not outwaited: {receipt}")
            took.append(seconds * 1e3)
            _all_hold_leases(server, stubs[0])
    yield _longest("Delete, 2 workers, one of them frozen, longest", took, most)


def _longest(name: str, took: list[float], at_most: float) -> Figure:
    return Figure(name, "ms", max(took), min(took), max(took), len(took), at_most=at_most)


class _Stubs:
    """The stubs of one connection."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.tokens = pb_grpc.TokenServiceStub(channel)
        self.status = status_pb_grpc.StatusServiceStub(channel)

    def verifiers(self) -> list[status_pb.VerifierStatus]:
        answer = self.status.GetStatus(status_pb.GetStatusRequest(), timeout=CALL_SECONDS_MAX)
        return list(answer.verifiers)


@contextlib.contextmanager
def separate_channels(address: str, count: int) -> Iterator[list[grpc.Channel]]:
    """Yield channels with a connection each, which lead to several workers."""
    # Otherwise they would share one connection.
    options = [("grpc.use_local_subchannel_pool", 1)]
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(grpc.insecure_channel(address, options)) for _ in range(count)]


@contextlib.contextmanager
def _stubs(server: Server) -> Iterator[list[_Stubs]]:
    with separate_channels(server.address, CHANNELS) as channels:
        yield [_Stubs(channel) for channel in channels]


def _delete(stubs: _Stubs, token_id: str) -> tuple[float, pb.Receipt]:
    """Delete a token; return the seconds and the receipt."""
    request = pb.DeleteRequest(account_id=ACCOUNT, id=token_id)
    began = time.perf_counter()
    answer = stubs.tokens.Delete(request, timeout=CALL_SECONDS_MAX)
    return time.perf_counter() - began, answer.receipt


def _other_worker(server: Server, stubs: _Stubs) -> int:
    """Return the process of a worker to which this connection does not lead."""
    answering = {v.process_id for v in stubs.verifiers() if v.answering}
    return next(pid for pid in server.workers if pid not in answering)


def _all_hold_leases(server: Server, stubs: _Stubs) -> None:
    """Wait until a delayed worker is a verifier again."""
    give_up = time.monotonic() + CALL_SECONDS_MAX
    while True:
        alive = [v for v in stubs.verifiers() if v.lease_remaining.ToNanoseconds() > 0]
        if {v.process_id for v in alive} == set(server.workers):
            return
        if time.monotonic() > give_up:
            raise RuntimeError("a worker that was frozen has not come back")
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _watching(
    bench: Bench, server: Server, clients: int, each: int, cores: set[int]
) -> Iterator[list[Child]]:
    """Run clients, `each` to a process, and yield the processes once all of them watch."""
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(
                processes.child(bench.scratch, "coherence_clients", (server.address, some), cores)
            )
            for some in _shares(clients, each)
        ]
        _all_watch(children)
        yield children
        # All at once, because each one signs off from the server.
        for child in children:
            child.dismiss()


def _all_watch(children: list[Child]) -> None:
    for child in children:
        child.tell("")
    for child in children:
        child.hear(CLIENTS_SECONDS_MAX)


def _shares(total: int, each: int) -> Iterator[int]:
    for place in itertools.count(0, each):
        if place >= total:
            return
        yield min(each, total - place)


def _server(
    bench: Bench, database: str, workers: int, cores: set[int]
) -> "contextlib.AbstractContextManager[Server]":
    name = f"{database}-{workers}"
    settings = bench.settings(database, WORKERS=workers, LEASE_SECONDS=LEASE_SECONDS)
    return processes.latchkey(bench.scratch, name, settings, cores)


def _both(bench: Bench) -> set[int]:
    return {bench.cores.server, bench.cores.load}
