"""A deleted token stays dead when the standby of a Postgres pair takes over from the primary.

Each test replays a sequence that happened on real pairs. Replication is synchronous unless the
docstring says otherwise, and the service runs as its users run it. Each step is forced, and the
next one waits until Postgres reports its effect.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import grpc
import latchkey
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.faults.host import (
    ACCOUNT,
    RECOVERY_SECONDS_MAX,
    TRANSIENT,
    Host,
    client_refuses,
    client_remembers,
    head,
    host,
    two_hosts,
)
from tests.helpers.postgres_node import Node, Template
from tests.helpers.replicated_pair import Pair, pair
from tests.helpers.waiting import POLL_SECONDS, eventually

pytestmark = pytest.mark.slow("runs pairs of Postgres servers")

LEASE_SECONDS = 3.0
DELETION = "INTO deletion"
RENEWAL = "verifier"


@pytest.fixture
async def nodes(scratch: Path, pair_template: Template) -> AsyncIterator[Pair]:
    """A pair with synchronous replication."""
    async with pair(scratch, pair_template) as made:
        yield made


async def test_a_revision_of_the_old_primary_confirms_no_deletion_of_the_new_one(
    nodes: Pair, tmp_path: Path, pepper_file: Path
) -> None:
    """Replication stalls, and a Delete of some token is unavailable. One backend is killed, and
    crash recovery makes that deletion visible on the old primary, as revision 1. A host applies it.
    The primary dies, the standby is promoted, and a Delete of another token commits there as
    revision 1 too. The host reconnects a moment later. It must not confuse the new revision 1 with
    the one that it has applied: once that Delete has returned, the host refuses the token."""
    first, second = nodes.first, nodes.second
    async with two_hosts(nodes.first, tmp_path, pepper_file) as hosts:
        doomed, unfortunate = await hosts.deleter.create(), await hosts.deleter.create()
        await hosts.other.answers(doomed.secret, "VALID")
        await nodes.replication.stall()
        # Its sessions stay, but it cannot connect to cancel a statement that takes too long.
        await hosts.deleter_link.switch(None, cut=False)
        deletion = asyncio.ensure_future(
            hosts.deleter.call(
                "Delete", pb.DeleteRequest(account_id=ACCOUNT, id=unfortunate.token.id)
            )
        )
        await eventually(lambda: first.waiting_commits(DELETION), "the deletion waits")
        await hosts.deleter_link.switch(None, cut=True)
        await first.crash_waiting_commit(DELETION)
        assert (await deletion).code is grpc.StatusCode.UNAVAILABLE
        assert await head(first) == 1
        # Only the other host is connected, and it reads the log no later than its renewal.
        await eventually(lambda: first.waiting_commits(RENEWAL), "the other host renews")
        await hosts.part()
        await first.kill()
        await second.promote()
        assert await head(second) == 0
        await hosts.delete_before_the_other_returns(second, doomed.token)
        await hosts.other.refuses(doomed.secret)
        await hosts.deleter.refuses(doomed.secret)
        await hosts.other.answers(unfortunate.secret, "VALID")


async def test_a_session_that_stays_with_the_old_primary_yields_no_verdict(
    nodes: Pair, tmp_path: Path, pepper_file: Path
) -> None:
    """Both nodes share one address, which moves to the promoted standby without ending open
    sessions. The old primary keeps running and shows an unreplicated revision, because a Delete
    that waited for the standby was cancelled. A host that renews on the new primary must not answer
    from reads of its other sessions on the old one, whatever their revision. Its health probe
    reports SERVING once verifies are answered correctly."""
    first, second = nodes.first, nodes.second
    async with contextlib.AsyncExitStack() as stack:
        stays = await stack.enter_async_context(
            host(tmp_path, "stays", nodes.address_url, pepper_file, lease_seconds=LEASE_SECONDS)
        )
        # The token must not be in the host's cache, so that the host has to read it.
        doomed, unfortunate, kept = [await stays.create() for _ in range(3)]
        await stays.answers(kept.secret, "VALID")
        await nodes.replication.stall()
        deletion = asyncio.ensure_future(
            stays.call("Delete", pb.DeleteRequest(account_id=ACCOUNT, id=unfortunate.token.id))
        )

        async def visible() -> bool:
            await first.cancel_waiting_commits(DELETION)
            return await head(first) == 1

        await eventually(visible, "the deletion is visible on the old primary")
        assert (await deletion).code is grpc.StatusCode.UNAVAILABLE
        await second.promote()
        await nodes.address.switch(second, cut=False)
        deleter = await stack.enter_async_context(
            host(tmp_path, "deleter", second.url, pepper_file, lease_seconds=LEASE_SECONDS)
        )
        await deleter.delete(doomed.token)
        assert await head(second) == 1
        await stays.refuses(doomed.secret)
        await stays.answers(kept.secret, "VALID")
        await stays.answers(unfortunate.secret, "VALID")
        await eventually(stays.is_serving, "the health probe says SERVING")


class Deposed(NamedTuple):
    """A host that moved to the second node, while the first one is running again, unfenced."""

    host: Host
    doomed: pb.CreateResponse
    """Deleted on the new primary, which the first node does not know."""
    live: pb.CreateResponse
    """Created on the new primary."""


@contextlib.asynccontextmanager
async def deposed(nodes: Pair, folder: Path, pepper_file: Path) -> AsyncIterator[Deposed]:
    async with host(folder, "host", nodes.url, pepper_file, lease_seconds=LEASE_SECONDS) as running:
        doomed = await running.create()
        await running.answers(doomed.secret, "VALID")
        await nodes.first.kill()
        await nodes.second.promote()
        live = await running.create()
        await running.delete(doomed.token)
        await running.refuses(doomed.secret)
        await nodes.first.start()
        yield Deposed(running, doomed, live)


async def knows_of_hosts(node: Node) -> bool:
    """Return whether a host of the service is connected to this node."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'latchkey'"
    return bool(await node.fetchval(query))


async def test_a_lease_of_the_new_primary_covers_no_read_of_the_old_one(
    nodes: Pair, tmp_path: Path, pepper_file: Path
) -> None:
    """The new primary restarts while the old one is running again, unfenced, and a host connects to
    the old one. The host must not answer from it under the lease that the new primary granted: a
    token deleted long ago is never VALID. When the new primary is back, the host returns to it
    automatically, although the old one still answers."""
    async with deposed(nodes, tmp_path, pepper_file) as (running, doomed, live):
        await nodes.second.stop("fast")
        # The last renewal was before the stop.
        lease_over = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < lease_over:
            assert await running.verdict(doomed.secret) != "VALID"
            await asyncio.sleep(POLL_SECONDS)
        await eventually(lambda: knows_of_hosts(nodes.first), "the host finds the old primary")
        await nodes.second.start()
        await running.refuses(doomed.secret)
        await running.answers(live.secret, "VALID")
        await running.delete(live.token)


async def test_a_deposed_primary_never_says_that_a_token_does_not_exist(
    nodes: Pair, tmp_path: Path, pepper_file: Path
) -> None:
    """A token was created on the new primary, which is briefly down, while the old one is running
    again, unfenced. Until the new primary is back, Get, List and Delete of that token may be
    unavailable, but must not return NOT_FOUND or a list without it: someone who deletes a leaked
    token would conclude that it never existed."""
    async with deposed(nodes, tmp_path, pepper_file) as (running, _, live):
        get = pb.GetRequest(account_id=ACCOUNT, id=live.token.id)
        get_all = pb.ListRequest(account_id=ACCOUNT)
        delete = pb.DeleteRequest(account_id=ACCOUNT, id=live.token.id)
        await nodes.second.stop("fast")
        wrong: set[str] = set()
        strayed = False
        # Before the lease expires, and afterwards.
        async with asyncio.timeout(RECOVERY_SECONDS_MAX):
            lease_over = time.monotonic() + LEASE_SECONDS
            while not strayed or time.monotonic() < lease_over:
                strayed = strayed or await knows_of_hosts(nodes.first)
                for method, request in (("Get", get), ("List", get_all), ("Delete", delete)):
                    end = await running.call(method, request)
                    if end.code not in TRANSIENT:
                        wrong.add(f"{method}: {end.code.name} {end.response or ''}".strip())
                await asyncio.sleep(POLL_SECONDS)
        assert wrong == set()
        await nodes.second.start()
        listed = await running.insist("List", get_all)
        assert [token.id for token in listed.tokens] == [live.token.id]
        assert (await running.insist("Get", get)).token == live.token
        await running.delete(live.token)


async def test_a_revision_that_an_asynchronous_standby_lacks_confirms_no_later_deletion(
    scratch: Path, pair_template: Template, tmp_path: Path, pepper_file: Path
) -> None:
    """Replication is asynchronous, and the standby lacks one deletion when the primary dies. That
    deletion is lost. The next one gets its number on the new primary and must count in full: a host
    that applied the lost one, and a client library that watches this host, refuse the token once
    its Delete has returned."""
    async with (
        pair(scratch, pair_template, synchronous=False) as nodes,
        two_hosts(nodes.first, tmp_path, pepper_file) as hosts,
        latchkey.Verifier(hosts.other.address, timeout_seconds=5) as verifier,
    ):
        doomed, lost = await hosts.deleter.create(), await hosts.deleter.create()
        await nodes.caught_up(nodes.first, nodes.second)
        await client_remembers(verifier, doomed.secret)
        await hosts.other.answers(doomed.secret, "VALID")
        await nodes.replication.stall()
        receipt = await hosts.deleter.delete(lost.token)
        assert receipt.revision == 1
        await hosts.part()
        await nodes.first.kill()
        await nodes.second.promote()
        assert await head(nodes.second) == 0
        await hosts.delete_before_the_other_returns(nodes.second, doomed.token)
        await client_refuses(verifier, doomed.secret)
        await hosts.other.refuses(doomed.secret)
        await hosts.deleter.refuses(doomed.secret)
