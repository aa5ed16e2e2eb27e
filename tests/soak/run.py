"""A soak: start the service, rest, apply load, rest again, end, and judge the samples."""

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
from latchkey_service.postgres.connections import POOL_SIZE_MAX
from latchkey_service.postgres.embedded_cluster import EmbeddedPostgres
from latchkey_service.tokens import pepper_file

from tests.helpers.callers import policy_text, write_server_files
from tests.helpers.imported_keys import IMPORTED_PREFIX
from tests.helpers.service_process import Service
from tests.helpers.waiting import POLL_SECONDS, eventually
from tests.soak import report
from tests.soak.connections import Place
from tests.soak.load import Load, loading
from tests.soak.samples import Samples
from tests.soak.slope import BLOCKS_MIN

__all__ = ["run"]

SAMPLE_SECONDS = 5.0
SAMPLES_MIN = 40
# A busy machine takes fewer samples in the same time. Too few show no trend, so the load continues
# until so many can be judged, but not much longer than the run may take.
JUDGED_MIN = 2 * BLOCKS_MIN
LONGER_SECONDS_MAX = 60.0
# Time for the start, a longer load, two rests, and the end.
OVERTIME_SECONDS = 240.0
# The server drops a killed client within three leases, and the connection of a closed channel at
# once.
REST_SECONDS_MAX = 30.0
# How many more of each there may be after the load than before it. A worker's connections to the
# database, and the objects that serve them, stay for five minutes. The callers that are still
# connected may have moved from one worker to another, so their connections are counted together.
STAYS = {
    "file descriptors without callers": POOL_SIZE_MAX,
    "connections of callers": 0,
    "tasks": 8,
    "watch streams": 0,
}
WORKERS = 2


async def run(
    folder: Path,
    seconds: float,
    *,
    scale: float = 1.0,
    rest_seconds: float = REST_SECONDS_MAX,
    say: Callable[[str], None] = lambda _: None,
    leaks: Sequence[str] = (),
) -> report.Found:
    """Run a soak in an empty folder that Postgres' own account can enter. Ends everything it
    starts.

    `leaks` are planted in the workers.
    """
    every = min(SAMPLE_SECONDS, seconds / SAMPLES_MIN)
    policy = folder / "policy.toml"
    policy.write_text(policy_text())
    given: dict[str, object] = {
        "listen": "127.0.0.1:0",
        "tls_listen": "127.0.0.1:0",
        "policy": policy,
        "data_dir": folder / "data",
        "workers": WORKERS,
        "imported_prefixes": IMPORTED_PREFIX,
        "grace_seconds": 5,
        # Small, so that the cache soon reaches its bound.
        "cache_entries": 1_000,
        "soak_summary_seconds": every,
        # Without this, only root may read its memory and files.
        "core_dumps": "on",
        **write_server_files(folder),
    }
    if leaks:
        given["soak_leak"] = ",".join(leaks)
    async with asyncio.timeout(seconds + OVERTIME_SECONDS):
        running = _Service(folder / "service", **given)
        try:
            return await _soak(running, folder, policy, seconds, every, scale, rest_seconds, say)
        finally:
            running.clean_up()


class _Service(Service):
    module = "tests.soak.worker"


async def _soak(
    running: Service,
    folder: Path,
    policy: Path,
    seconds: float,
    every: float,
    scale: float,
    rest_seconds: float,
    say: Callable[[str], None],
) -> report.Found:
    address = await running.welcome()
    tls = re.search(r"With TLS it serves on (\S+)\.", running.out)
    assert tls is not None, running.out
    keyring = pepper_file.load_or_create(folder / "data" / "peppers", create=False)
    place = Place(address, tls[1], running.pid, keyring, policy, folder)
    workers = running.worker_pids
    url = EmbeddedPostgres(folder / "data").dsn()
    async with loading(place, scale) as load:
        before = await _at_rest(running, workers, load, {}, 0.0)
        samples = Samples(running, url)
        say(f"The service is up on {address}, with workers {workers}.")
        load_cpu = time.process_time()
        began = time.monotonic()
        sampling = asyncio.create_task(samples.run(every))
        loads = asyncio.create_task(load.run())
        try:
            await _unless_one_ends(seconds, sampling, loads)
            while not _enough(samples, lasted := time.monotonic() - began):
                if lasted > seconds + LONGER_SECONDS_MAX:
                    break
                await _unless_one_ends(every, sampling, loads)
        finally:
            for task in (loads, sampling):
                task.cancel()
            await asyncio.gather(loads, sampling, return_exceptions=True)
        took = time.monotonic() - began
        load_cores = (time.process_time() - load_cpu) / took
        await load.wait()
        after = await _at_rest(running, workers, load, before, rest_seconds)
        await load.close()
    troubles = _strange(running, workers)
    if (code := await running.end()) != 0:
        troubles.append(f"the service ended with {code}")
    # A process that its parent has ended is briefly a zombie.
    with contextlib.suppress(AssertionError):
        await eventually(lambda: not running.alive(), "all processes have ended")
    troubles += [f"{process} was left behind" for process in running.alive()]
    return report.Found(
        took,
        report.judge(samples.series, took),
        load.tally.done,
        load.tally.left_out,
        load.tally.wrong,
        load.tally.unexpected,
        load.tally.refused,
        _stayed(before, after),
        samples.cpu_seconds / took,
        load_cores,
        troubles,
    )


def _enough(samples: Samples, seconds: float) -> bool:
    """Return whether a load of so many seconds has been sampled often enough to be judged."""
    since = report.WARM_UP_SHARE * seconds
    return sum(at >= since for at in samples.taken) >= JUDGED_MIN


async def _unless_one_ends(seconds: float, *tasks: "asyncio.Task[None]") -> None:
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


Rest = dict[tuple[int, str], int]


async def _at_rest(
    running: Service, workers: list[int], load: Load, before: Rest, within: float
) -> Rest:
    """Return the counts of each worker at rest. After the load, wait for at most `within`
    seconds until they have fallen to the earlier counts.
    """
    give_up = time.monotonic() + within
    while True:
        told = len([line for line in running.log if line["event"] == "counts"])
        rest: Rest = {}

        async def tell(told: int = told, rest: Rest = rest) -> bool:
            # A worker reports only if it has something to report.
            await load.ask_anyone()
            lines = [line for line in running.log if line["event"] == "counts"][told:]
            for line in lines:
                rest[line["pid"], "tasks"] = line["tasks"]
                rest[line["pid"], "watch streams"] = line["watch.streams"]
            return set(workers) <= {pid for pid, _ in rest}

        await eventually(tell, "each worker reports its counts")
        rest[running.pid, "connections of callers"] = 0
        for pid in workers:
            callers = _connections_of_callers(pid)
            rest[running.pid, "connections of callers"] += callers
            rest[pid, "file descriptors without callers"] = psutil.Process(pid).num_fds() - callers
        if not before or not _stayed(before, rest) or time.monotonic() > give_up:
            return rest
        await asyncio.sleep(POLL_SECONDS)


def _connections_of_callers(pid: int) -> int:
    # The database is reached through a Unix socket.
    connections = psutil.Process(pid).net_connections("tcp")
    return sum(connection.status != psutil.CONN_LISTEN for connection in connections)


def _stayed(before: Rest, after: Rest) -> list[str]:
    return [
        f"process {pid}: {after[pid, what]} {what} at rest after the load, {count} before"
        for (pid, what), count in before.items()
        if after[pid, what] > count + STAYS[what]
    ]


# grpcio's server logs this as an error when a client disconnects while it is being answered.
LEFT = "ExecuteBatchError raised in core by servicer method"
# The callers count these calls (`report.Found.refused`).
SLOW = '"reason": "DATABASE_UNAVAILABLE"'


def _strange(running: Service, workers: list[int]) -> list[str]:
    """Return the entries of the service's log that the load does not explain."""
    found: list[str] = []
    if running.worker_pids != workers:
        found.append(f"workers died: {workers} became {running.worker_pids}")
    found += [
        f"in the log: {line[:500]}"
        for line in running.err.splitlines()
        if not line.startswith("{") or '"level": "error"' in line or '"exception"' in line
        if LEFT not in line and SLOW not in line
    ]
    return found[: report.SHOWN]
