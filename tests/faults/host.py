"""Hosts of the service for tests of failover and restore: processes, and a connection to each."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import latchkey
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.helpers.calls import CHANNEL_OPTIONS, Outcome, is_serving, outcome, server_only_deadline
from tests.helpers.postgres_node import Node
from tests.helpers.replicated_pair import Link
from tests.helpers.service_process import Service, service
from tests.helpers.waiting import eventually

__all__ = [
    "ACCOUNT",
    "RECOVERY_SECONDS_MAX",
    "TRANSIENT",
    "Host",
    "TwoHosts",
    "client_refuses",
    "client_remembers",
    "head",
    "host",
    "two_hosts",
]

ACCOUNT = "acme"
# A call waits for a connection and two statements, of two seconds each at most.
CALL_SECONDS_MAX = 8.0
# A Delete may also have to wait for the end of a lease of up to 5 s.
DELETE_SECONDS_MAX = 15.0
# A host finds the primary, renews its lease and answers again within seconds. This leaves room for
# a busy machine, on which two Deletes in a row may each reach their limit.
RECOVERY_SECONDS_MAX = 45.0
# The longest lease: a host that is kept from the database for a moment still has its row after it,
# although another host removes rows that lapse.
LONG_LEASE_SECONDS = 5.0
# The first answer without a lease comes from a read, later ones may come from the cache.
ANSWERS_IN_A_ROW = 5
# Statuses of a call that may be repeated.
TRANSIENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class Host:
    """A running service, created by `host`."""

    def __init__(self, running: Service, address: str, channel: grpc.aio.Channel) -> None:
        self.service = running
        self.address = address
        self._channel = channel
        self._stub: Any = pb_grpc.TokenServiceStub(channel)
        self._numbers = itertools.count(1)

    async def call(self, method: str, request: Any, seconds: float = CALL_SECONDS_MAX) -> Outcome:
        """Make one attempt at a call."""
        return await outcome(getattr(self._stub, method)(request, **server_only_deadline(seconds)))

    async def insist(self, method: str, request: Any, seconds: float = CALL_SECONDS_MAX) -> Any:
        """Repeat a call while the service is unavailable, and return its response."""

        async def answered() -> Any:
            end = await self.call(method, request, seconds)
            if not end.ok and end.code not in TRANSIENT:
                pytest.fail(f"{method} was answered {end.code.name}")
            return end.response

        return await eventually(answered, f"{method} is answered", RECOVERY_SECONDS_MAX)

    async def create(self) -> pb.CreateResponse:
        """Create a token with a unique name."""
        name = f"{self.service.pid} {next(self._numbers)}"
        request = pb.CreateRequest(account_id=ACCOUNT, name=name, scope=pb.SCOPE_READ)
        created: pb.CreateResponse = await self.insist("Create", request)
        return created

    async def delete(self, token: pb.Token) -> pb.Receipt:
        """Delete a token, and wait for a receipt that confirms it."""
        request = pb.DeleteRequest(account_id=ACCOUNT, id=token.id)
        receipt: pb.Receipt = (await self.insist("Delete", request, DELETE_SECONDS_MAX)).receipt
        assert receipt.HasField("effective_time")
        return receipt

    async def delete_finds_nothing(self, token: pb.Token) -> bool:
        """Return whether one attempt to delete a token returns NOT_FOUND."""
        end = await self.call("Delete", pb.DeleteRequest(account_id=ACCOUNT, id=token.id))
        return end.code is grpc.StatusCode.NOT_FOUND

    async def verdict(self, secret: str) -> str:
        """Return the verdict of one attempt to verify, or the name of the status."""
        end = await self.call("Verify", pb.VerifyRequest(secret=secret))
        if not end.ok:
            return str(end.code.name)
        return str(pb.Verdict.Name(end.response.verdict)).removeprefix("VERDICT_")

    async def answers(self, secret: str, verdict: str, seconds: float | None = None) -> None:
        """Wait until the verdict on `secret` is this one."""

        async def answered() -> bool:
            return await self.verdict(secret) == verdict

        await eventually(answered, f"{verdict} is answered", seconds or RECOVERY_SECONDS_MAX)

    async def refuses(self, secret: str, verdict: str = "DELETED") -> None:
        """Wait until the verdict on a dead token is `verdict`, from the cache too; fail at once if
        one is VALID."""
        in_a_row = 0

        async def refused() -> bool:
            nonlocal in_a_row
            found = await self.verdict(secret)
            if found == "VALID":
                pytest.fail("the host answers VALID for a token that is dead")
            in_a_row = in_a_row + 1 if found == verdict else 0
            return in_a_row == ANSWERS_IN_A_ROW

        await eventually(refused, f"{verdict} is answered", RECOVERY_SECONDS_MAX)

    async def is_serving(self) -> bool:
        """Return the status that the health service reports."""
        return await is_serving(self._channel)


@contextlib.asynccontextmanager
async def host(
    folder: Path, name: str, database_url: str, pepper_file: Path, **settings: object
) -> AsyncIterator[Host]:
    """Run the service as its users do, on a given database."""
    given: dict[str, object] = {
        "listen": "127.0.0.1:0",
        "database_url": database_url,
        "data_dir": folder / "unused",
        "pepper_file": pepper_file,
        "grace_seconds": 1,
        "log_format": "json",
    }
    with service(folder / name, **(given | settings)) as running:
        address = await running.welcome()
        async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            yield Host(running, address, channel)


async def head(node: Node) -> int:
    """Return the newest revision that this node shows."""
    return int(await node.fetchval("SELECT revision FROM head"))


async def shows(node: Node, revision: int) -> None:
    """Wait until `revision` is the newest that this node shows."""

    async def shown() -> bool:
        return await head(node) == revision

    await eventually(shown, f"{node.name} shows revision {revision}")


class TwoHosts(NamedTuple):
    """Two hosts with separate links to the database, which a test opens and closes."""

    deleter: Host
    deleter_link: Link
    other: Host
    other_link: Link

    async def part(self) -> None:
        """Close both links to the database."""
        await self.deleter_link.switch(None, cut=True)
        await self.other_link.switch(None, cut=True)

    async def delete_before_the_other_returns(self, node: Node, token: pb.Token) -> pb.Receipt:
        """Delete on `node`, to which only the deleting host is connected. Reconnect the other host
        once the deletion is committed as revision 1."""
        await self.deleter_link.switch(node, cut=True)
        deletion = asyncio.ensure_future(self.deleter.delete(token))
        await shows(node, 1)
        await self.other_link.switch(node, cut=True)
        return await deletion


@contextlib.asynccontextmanager
async def two_hosts(
    node: Node, folder: Path, pepper_file: Path, **settings: object
) -> AsyncIterator[TwoHosts]:
    """Run two hosts on a node, each connected by a separate link."""
    settings = {"lease_seconds": LONG_LEASE_SECONDS} | settings
    async with contextlib.AsyncExitStack() as stack:
        links = [Link(node), Link(node)]
        for link in links:
            await link.open()
            stack.push_async_callback(link.close)
        deleter, other = [
            await stack.enter_async_context(
                host(folder, name, node.url_at(link.address), pepper_file, **settings)
            )
            for name, link in zip(("deleter", "other"), links, strict=True)
        ]
        yield TwoHosts(deleter, links[0], other, links[1])


async def client_remembers(verifier: latchkey.Verifier, secret: str) -> None:
    """Wait until a client library answers VALID for `secret` from its cache."""

    async def remembered() -> bool:
        with contextlib.suppress(latchkey.Unavailable):
            await verifier.verify(secret)
        answer = verifier.verify_nowait(secret)
        return answer is not None and answer.allowed

    await eventually(remembered, "the client library caches the token")


async def client_refuses(
    verifier: latchkey.Verifier,
    secret: str,
    verdict: latchkey.Verdict = latchkey.Verdict.DELETED,
    *,
    at_once: bool = True,
) -> None:
    """Wait until a client library watches and its verdict on a dead token is `verdict`, from the
    cache too. With `at_once`, fail if one is VALID."""
    in_a_row = 0

    async def refused() -> bool:
        nonlocal in_a_row
        answers = [verifier.verify_nowait(secret)]
        with contextlib.suppress(latchkey.Unavailable):
            answers.append(await verifier.verify(secret))
        known = [answer.verdict for answer in answers if answer is not None]
        if at_once and latchkey.Verdict.VALID in known:
            pytest.fail("the client library answers VALID for a token that is dead")
        refuses = bool(known) and set(known) == {verdict} and verifier.stats().watching
        in_a_row = in_a_row + 1 if refuses else 0
        return in_a_row == ANSWERS_IN_A_ROW

    await eventually(refused, f"the client library answers {verdict}", RECOVERY_SECONDS_MAX)
