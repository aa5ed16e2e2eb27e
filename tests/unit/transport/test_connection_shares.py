"""Which connections end when there are too many."""

from latchkey_service.transport.connection_shares import (
    IDLE_SECONDS,
    Held,
    busiest,
    surplus,
)

IDLE, BUSY = IDLE_SECONDS + 5, 1.0


def held(*each: tuple[str | None, float]) -> list[Held]:
    return [Held(number, peer, silent) for number, (peer, silent) in enumerate(each)]


def test_nothing_ends_within_the_limits() -> None:
    """Within both limits, an idle connection stays."""
    connections = held(("a", IDLE), ("a", BUSY), ("b", IDLE))
    assert surplus(connections, 3, 2) == {}
    assert surplus(connections, 3, 0) == {}
    assert busiest(connections) == 2


def test_an_address_has_a_share() -> None:
    """An address above its limit loses connections: the longest idle first, then the newest. Other
    addresses lose none."""
    connections = held(("a", BUSY), ("a", IDLE), ("b", BUSY), ("a", IDLE + 1), ("a", BUSY))
    assert surplus(connections, 100, 3) == {3: "address"}
    assert surplus(connections, 100, 2) == {3: "address", 1: "address"}
    assert surplus(connections, 100, 1) == {3: "address", 1: "address", 4: "address"}


def test_connections_behind_a_proxy_have_no_common_limit() -> None:
    """Connections without a peer address count only for the limit of the listener."""
    connections = held((None, BUSY), (None, BUSY), (None, BUSY))
    assert surplus(connections, 3, 1) == {}
    assert surplus(connections, 2, 1) == {2: "too_many"}
    assert busiest(connections) == 0


def test_idle_connections_make_room_for_newcomers() -> None:
    """In a full listener, the longest idle connection ends, not the newest one."""
    connections = held(("a", BUSY), ("b", IDLE), ("c", IDLE + 1), ("d", BUSY))
    assert surplus(connections, 3, 0) == {2: "idle"}
    assert surplus(connections, 2, 0) == {2: "idle", 1: "idle"}
    assert len(surplus(connections, 1, 0)) == 3


def test_the_address_with_the_most_connections_loses_first() -> None:
    """In a full listener, an address with many busy connections loses one before an address with a
    few idle ones."""
    connections = held(("few", IDLE), *[("many", BUSY)] * 9)
    assert surplus(connections, 9, 0) == {9: "too_many"}
    ended = surplus(connections, 4, 0)
    assert len(ended) == 6
    assert 0 not in ended
    assert len(surplus(connections, 0, 0)) == 10
