"""Which of the service's files real calls pass: `python -m tests.trips` prints them.

docs/architecture.md describes the trips of a warm Verify, a cold Verify and a Delete. This traces
such calls with `sys.setprofile`, in one process that has a server, its event loop and a plain
grpcio client, and lists each file that ran a function for the call, in the order of first use.

Background work shares the event loop: leases are renewed, deadlines are checked. So each trip is
traced several times, and only the files that every one of them passed count.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.access.credentials import mint, policy_digest
from latchkey_service.postgres.embedded_cluster import EmbeddedPostgres
from latchkey_service.postgres.migrate import bundled, migrate
from latchkey_service.settings import logs
from latchkey_service.tokens import pepper_file

from tests.helpers.repository import ROOT
from tests.helpers.scratch import SCRATCH
from tests.helpers.servers import make_settings, serving

if TYPE_CHECKING:
    from types import CodeType, FrameType

    from latchkey_proto.v1.token_service_pb2_grpc import TokenServiceAsyncStub

__all__ = ["Trip", "trace_all"]

SERVICE = str(ROOT / "service/latchkey_service") + "/"
CORE = str(ROOT / "proto") + "/"
PATHS = {"rpc/verify_calls.py", "rpc/managed_calls.py"}
# A renewal happens once a second and takes as long as a call. It does not coincide with this many
# calls in a row.
REPEATS = 10
# Far more than a call takes on a busy machine.
CALL_SECONDS = 20.0
# Tasks that run at least ten times a second, and so beside each call that takes long: one measures
# the event loop, and one counts connections.
SAMPLERS = ("LoopWatch.run", "ConnectionGuard.run")

_numbers = itertools.count(1)


class Trip(NamedTuple):
    """The files of one kind of call, in the order of first use.

    `call` lists the files that run in the call's own task, and the transport's. `beside` lists
    those that run for the call only in other tasks. `sometimes` lists the files that only some of
    the traced calls used, by coincidence or not.
    """

    call: list[str]
    beside: list[str]
    sometimes: set[str]


def name_of(code: CodeType) -> str | None:
    """Return the file of a function, relative to its package, or None if it is not counted."""
    file = code.co_filename
    if file.startswith(SERVICE):
        return file.removeprefix(SERVICE)
    name = file.removeprefix(CORE)
    return name if name.startswith("latchkey_coherence/") else None


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[object, str]]]:
    """Record the task and the file of each call of a function, on this thread."""
    seen: dict[tuple[object, str], None] = {}
    calls: list[tuple[object, str]] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and (name := name_of(frame.f_code)) is not None:
            task = asyncio.current_task()
            if task is None or task.get_name() not in SAMPLERS:
                seen.setdefault((task, name))

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(before)
        calls += seen


async def trip(prepare: Callable[[], Awaitable[Callable[[], Awaitable[object]]]]) -> Trip:
    """Trace a kind of call. `prepare` returns a call that has not been sent yet."""
    calls: list[list[str]] = []
    both: list[set[str]] = []
    for _ in range(REPEATS):
        send = await prepare()
        with recording() as seen:
            await send()
        own = {task for task, name in seen if name in PATHS}
        calls.append([n for task, n in seen if task in own or n.startswith("transport/")])
        both.append({name for _, name in seen})
        order = list(dict.fromkeys(name for _, name in seen))
    always = set.intersection(*both)
    in_call = set.intersection(*map(set, calls))
    return Trip(
        [name for name in order if name in in_call],
        [name for name in order if name in always - in_call],
        set.union(*both) - always,
    )


async def trace(address: str, credential: str | None = None) -> dict[str, Trip]:
    """Trace calls on a server that runs in this event loop.

    With `credential`, the calls present it.
    """
    metadata = () if credential is None else (("authorization", f"Bearer {credential}"),)
    async with grpc.aio.insecure_channel(address) as channel:
        stub: TokenServiceAsyncStub = pb_grpc.TokenServiceStub(channel)

        async def create() -> pb.CreateResponse:
            return await stub.Create(
                pb.CreateRequest(
                    account_id="acme", name=f"trip {next(_numbers)}", scope=pb.SCOPE_READ
                ),
                metadata=metadata,
                timeout=CALL_SECONDS,
            )

        def verify(secret: str) -> Callable[[], Awaitable[object]]:
            async def send() -> None:
                answer = await stub.Verify(
                    pb.VerifyRequest(secret=secret), metadata=metadata, timeout=CALL_SECONDS
                )
                assert answer.verdict == pb.VERDICT_VALID

            return send

        async def cold() -> Callable[[], Awaitable[object]]:
            return verify((await create()).secret)

        async def warm() -> Callable[[], Awaitable[object]]:
            send = await cold()
            await send()
            return send

        async def delete() -> Callable[[], Awaitable[object]]:
            token = (await create()).token

            async def send() -> None:
                await stub.Delete(
                    pb.DeleteRequest(account_id="acme", id=token.id),
                    metadata=metadata,
                    timeout=CALL_SECONDS,
                )

            return send

        return {
            "warm Verify": await trip(warm),
            "cold Verify": await trip(cold),
            "Delete": await trip(delete),
        }


async def trace_all(folder: Path, url: str) -> dict[str, Trip]:
    """Trace calls on the migrated database at `url`, without a policy and with one.

    Files for the servers go into `folder`.
    """
    path = folder / "trips.peppers"
    pepper_file.load_or_create(path, create=True)
    settings = make_settings(url, path, "native")
    async with serving(settings) as address:
        trips = await trace(address)
    policy, credential = folder / "trips.toml", mint(os.urandom)
    policy.write_text(
        f'[callers.tracer]\ncredentials = ["{policy_digest(credential)}"]\n'
        'roles = ["verifier", "manager"]\n'
    )
    policy.chmod(0o600)
    async with serving(settings.model_copy(update={"policy": policy})) as address:
        allowed = await trace(address, credential.reveal())
    return trips | {f"{kind} with a policy": trip for kind, trip in allowed.items()}


def main() -> None:
    """Print the trips."""
    logs.configure("console", "warning")
    with tempfile.TemporaryDirectory(prefix="latchkey-trips-", dir=SCRATCH) as name:
        folder = Path(name)
        # The embedded Postgres runs under another account if this is root.
        folder.chmod(0o755)
        postgres = EmbeddedPostgres(folder / "data")
        url = postgres.start()
        try:
            asyncio.run(migrate(url, bundled()))
            trips = asyncio.run(trace_all(folder, url))
        finally:
            postgres.stop()
    for kind, (call, beside, _) in trips.items():
        lines = [f"{kind}: {len(call)} in the call, {len(beside)} beside it"]
        lines += [f"  {name}" for name in call]
        lines += [f"  beside: {name}" for name in beside]
        print("\n".join(lines))  # noqa: T201 - for the developer


if __name__ == "__main__":
    main()
