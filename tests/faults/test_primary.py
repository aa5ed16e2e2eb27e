"""The service follows the host on which commits are durable, and reports which one that is.

Each test runs a synchronous pair of Postgres and the service as its users run it, with both hosts
in the URL.
"""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from latchkey_service.coherence.primary import OTHERS_SECONDS, STANDBY_MISSING

from tests.faults.host import RECOVERY_SECONDS_MAX, Host, host
from tests.helpers.postgres_node import Node, Template
from tests.helpers.replicated_pair import Pair, pair
from tests.helpers.waiting import eventually

pytestmark = pytest.mark.slow("runs pairs of Postgres servers")

LEASE_SECONDS = 3.0
CLI_SECONDS_MAX = 20.0
# The service queries the other hosts at this interval, with a spread; a busy machine adds to it.
WARNING_SECONDS_MAX = 2 * OTHERS_SECONDS + 10.0


@pytest.fixture
async def nodes(scratch: Path, pair_template: Template) -> AsyncIterator[Pair]:
    """A pair with synchronous replication."""
    async with pair(scratch, pair_template) as made:
        yield made


async def latchkey(running: Host, *arguments: str) -> str:
    """Run the command line tool against a host, and return what it prints."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "latchkey_cli", *arguments, "--target", running.address),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.defpath, "COLUMNS": "80"},
    )
    try:
        async with asyncio.timeout(CLI_SECONDS_MAX):
            out, err = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert process.returncode == 0, err.decode()
    assert err == b""
    return out.decode()


async def status(running: Host) -> Any:
    """Return what `latchkey status --json` prints."""
    return json.loads(await latchkey(running, "status", "--json"))


def servers(running: Host) -> list[tuple[str, str, str]]:
    """Return address, system identifier and timeline of each database server in the log."""
    return [
        (line["address"], line["system_identifier"], line["timeline"])
        for line in running.service.log
        if line["event"] == "database server"
    ]


async def described(node: Node) -> tuple[str, str, str]:
    """Return the log's description of a node: address, system identifier and timeline."""
    identifier = await node.fetchval("SELECT system_identifier::text FROM pg_control_system()")
    timeline = await node.fetchval("SELECT left(pg_walfile_name(pg_current_wal_lsn()), 8)")
    return node.address, identifier, timeline


def in_order(nodes: Pair, *, reverse: bool) -> str:
    """Return a URL that names both nodes, in this order."""
    addresses = [nodes.first.address, nodes.second.address]
    return nodes.first.url_at(*(reversed(addresses) if reverse else addresses))


@pytest.mark.parametrize("reverse", [False, True], ids=["in order", "reversed"])
async def test_the_service_follows_the_promoted_standby(
    nodes: Pair, tmp_path: Path, pepper_file: Path, reverse: bool
) -> None:
    """The standby is promoted while the old primary stays up, and the old primary is restarted
    later. Whatever the order of the hosts in the URL, the service serves from the new primary
    within seconds and stays there. The log and `latchkey status` name its address, system
    identifier and timeline, and warn that the other host also says that it is the primary. The
    warning ends when the old primary is stopped."""
    first, second = nodes.first, nodes.second
    url = in_order(nodes, reverse=reverse)
    async with host(tmp_path, "host", url, pepper_file, lease_seconds=LEASE_SECONDS) as running:
        kept, doomed = await running.create(), await running.create()
        old = await described(first)
        assert set(servers(running)) == {old}
        assert {v["database_host"] for v in (await status(running))["verifiers"]} == {first.address}
        await second.promote()
        # The old primary's commits now wait for a standby that no longer follows it.
        await running.delete(doomed.token)
        new = await described(second)
        assert new[1] == old[1]
        assert new[2] != old[2]
        assert set(servers(running)[1:]) == {new}

        async def warned() -> Any:
            found = await status(running)
            assert any(first.address in warning for warning in found["warnings"])
            return found

        found = await eventually(warned, "status warns of the old primary", WARNING_SECONDS_MAX)
        (warning,) = found["warnings"]
        assert warning.startswith("Another host of the list also says that it is the primary")
        for verifier in found["verifiers"]:
            assert (
                verifier["database_host"],
                verifier["system_identifier"],
                verifier["timeline"],
            ) == new
        text = " ".join((await latchkey(running, "status")).split())
        assert warning in text
        await first.stop("fast")
        await first.start()
        await running.refuses(doomed.secret)
        await running.answers(kept.secret, "VALID")
        token = await running.create()
        await running.delete(token.token)
        assert set(servers(running)[1:]) == {new}
        await first.stop("fast")

        async def ended() -> bool:
            return not (await status(running))["warnings"]

        await eventually(ended, "the warning ends", WARNING_SECONDS_MAX)


async def test_a_standby_of_these_tests_catches_up(nodes: Pair) -> None:
    """A standby that loses its connection finds what it needs on the primary, although checkpoints
    came in between. Otherwise, all commits of a test would hang from then on."""
    await nodes.replication.switch(None, cut=True)
    for _ in range(3):
        await nodes.first.flush()
        await nodes.first.execute("SELECT pg_switch_wal()")
        await nodes.first.execute("CHECKPOINT")
    await nodes.replication.switch(nodes.first, cut=False)
    await nodes.streams(nodes.first, synchronous=True)
    await nodes.caught_up(nodes.first, nodes.second)


async def test_a_host_that_starts_beside_a_deposed_primary_finds_the_new_one(
    nodes: Pair, tmp_path: Path, pepper_file: Path
) -> None:
    """The URL names the deposed primary first, which is up and accepts connections. A service that
    starts now serves from the new primary."""
    first, second = nodes.first, nodes.second
    async with host(tmp_path, "before", nodes.url, pepper_file) as running:
        kept = await running.create()
    await second.promote()
    async with host(tmp_path, "after", nodes.url, pepper_file) as running:
        await running.answers(kept.secret, "VALID")
        await running.delete(kept.token)
        await running.refuses(kept.secret)
        new = await described(second)
        assert set(servers(running)) == {new}
        query = "SELECT count(*) FROM deletion"
        assert await first.fetchval(query) == 0
        assert await second.fetchval(query) == 1


async def test_a_missing_synchronous_standby_is_named(
    nodes: Pair, tmp_path: Path, pepper_file: Path
) -> None:
    """The synchronous standby stops: reads answer, and commits hang. The log and `latchkey status`,
    which still answers, say so in those words. They stop when the standby is back, and the service
    serves again by itself."""
    first, second = nodes.first, nodes.second
    async with host(
        tmp_path, "host", nodes.url, pepper_file, lease_seconds=LEASE_SECONDS
    ) as running:
        kept = await running.create()
        await second.stop("immediate")

        async def warned() -> bool:
            return STANDBY_MISSING in (await status(running))["warnings"]

        await eventually(warned, "status names the missing standby", RECOVERY_SECONDS_MAX)
        assert STANDBY_MISSING in " ".join((await latchkey(running, "status")).split())
        told = [line["event"] for line in running.service.log if line["level"] == "error"]
        assert STANDBY_MISSING in told
        # Each worker once.
        assert told.count(STANDBY_MISSING) <= len(running.service.worker_pids)
        assert await running.verdict(kept.secret) == "UNAVAILABLE"
        await second.start()
        await running.answers(kept.secret, "VALID")

        async def quiet() -> bool:
            return not (await status(running))["warnings"]

        await eventually(quiet, "the warning ends", RECOVERY_SECONDS_MAX)
        assert {line[0] for line in servers(running)} == {first.address}
        events = [line["event"] for line in running.service.log]
        assert "commits are replicated again" in events
