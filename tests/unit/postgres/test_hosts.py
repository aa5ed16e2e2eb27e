"""The order in which the hosts of a database URL are tried."""

from typing import Any

import asyncpg
import pytest
from latchkey_service.postgres.hosts import Hosts, each_host

from tests.helpers.fake_connections import replace_connect

URL = "postgresql://role:secret@h1:1,h2:2,h3:3/db?sslmode=disable"
H1, H2, H3 = "h1:1", "h2:2", "h3:3"


class FakeConnection:
    """A connection to a host that accepts connections."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.terminated = False

    def terminate(self) -> None:
        self.terminated = True


class Cluster:
    """Hosts that accept or refuse connections, as a test sets."""

    def __init__(self) -> None:
        self.primaries = {H1, H2, H3}
        self.asked: list[str] = []

    async def connect(self, url: str, **_: object) -> FakeConnection:
        host = url.removeprefix("postgresql://").rpartition("@")[2].partition("/")[0]
        self.asked.append(host)
        return FakeConnection(host)

    async def prepare(self, connection: FakeConnection, *_: object) -> None:
        if connection.host not in self.primaries:
            raise asyncpg.TargetServerAttributeNotMatched("the server is a standby")


def is_of_cluster(url: str) -> bool:
    return any(host in url for host in (H1, H2, H3))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    replace_connect(monkeypatch, is_of_cluster, cluster.connect, cluster.prepare)
    return cluster


@pytest.fixture
def hosts(cluster: Cluster) -> Any:
    """Hosts whose connections are fakes."""
    return Hosts(URL)


async def test_the_first_order_is_that_of_the_url(hosts: Any, cluster: Cluster) -> None:
    """At first, the hosts are tried in the URL's order. The first one that accepts writes is tried
    first from then on. Names reveal neither role nor password."""
    assert hosts.names() == [H1, H2, H3]
    cluster.primaries = {H2}
    assert hosts.name_of(await hosts.connect()) == H2
    assert cluster.asked == [H1, H2]
    assert hosts.names() == [H2, H1, H3]


async def test_a_standby_is_disconnected(hosts: Any, cluster: Cluster) -> None:
    """A connection to a host that turns out to be a standby is closed."""
    made: list[FakeConnection] = []

    async def remember(url: str, **options: object) -> FakeConnection:
        made.append(await cluster.connect(url, **options))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        replace_connect(patch, is_of_cluster, remember, cluster.prepare)
        cluster.primaries = {H3}
        assert hosts.name_of(await hosts.connect()) == H3
    assert [(c.host, c.terminated) for c in made] == [(H1, True), (H2, True), (H3, False)]


async def test_a_proved_host_stays_first(hosts: Any, cluster: Cluster) -> None:
    """After a durable commit on a host, a connection that happens to reach another host does not
    move that host to the front: a deposed primary may accept connections, too."""
    proved = await hosts.connect_to(H2)
    hosts.prove(proved)
    assert hosts.names() == [H2, H1, H3]
    cluster.primaries = {H1}
    assert hosts.name_of(await hosts.connect()) == H1
    assert hosts.names() == [H2, H1, H3]
    cluster.primaries = {H1, H2}
    assert hosts.name_of(await hosts.connect()) == H2


async def test_a_host_that_is_left_is_tried_last(hosts: Any, cluster: Cluster) -> None:
    """A host on which renewals fail moves to the end of the list, so that the next one is tried,
    even if the first still accepts connections. The hosts are tried in turn until a commit proves
    one."""
    found = []
    for _ in range(4):
        connection = await hosts.connect()
        found.append(hosts.name_of(connection))
        hosts.leave(connection)
    assert found == [H1, H2, H3, H1]
    connection = await hosts.connect()
    assert hosts.name_of(connection) == H2
    hosts.prove(connection)
    assert hosts.names()[0] == H2


async def test_leaving_an_old_connection_changes_nothing(hosts: Any, cluster: Cluster) -> None:
    """A late failure on a connection to an earlier host does not discredit the host that a commit
    has proved since."""
    old = await hosts.connect_to(H1)
    hosts.prove(await hosts.connect_to(H2))
    hosts.leave(old)
    assert hosts.names() == [H2, H1, H3]
    hosts.prove(await hosts.connect_to(H3))
    assert hosts.names() == [H3, H2, H1]


async def test_one_host_cannot_be_left(cluster: Cluster) -> None:
    """A single host, such as a virtual IP, is tried again."""
    hosts: Any = Hosts("postgresql://h1:1/db")
    for _ in range(2):
        connection = await hosts.connect()
        assert hosts.name_of(connection) == H1
        hosts.leave(connection)


async def test_a_host_outside_the_url_is_rejected(hosts: Any) -> None:
    """Only hosts of the URL are ever connected to."""
    with pytest.raises(ValueError, match="h9"):
        await hosts.connect_to("h9")


@pytest.mark.parametrize(
    ("url", "names"),
    [
        ("postgresql://u:p%40@[::1]:5,h/db", ["[::1]:5", "h"]),
        ("postgresql:///db?host=/run/postgresql", [""]),
        ("postgres://h", ["h"]),
    ],
)
def test_names_of_hosts(url: str, names: list[str]) -> None:
    """The name of a host includes its port if the URL names one. A URL with the socket in its query
    names no host."""
    assert Hosts(url).names() == names
    assert len(each_host(url)) == len(names)
