"""When a worker returns free memory, and when connections without an identity end."""

import errno
import socket
from typing import Any

import pytest
from latchkey_service.transport import connection_guard
from latchkey_service.transport.connection_guard import ConnectionGuard
from latchkey_service.transport.memory_pressure import (
    PRESSURE_SHARE,
    STEP_SHARE,
    TRIM_SECONDS,
    KnownPeers,
    MemoryPressure,
    resident_bytes,
    trim,
)
from latchkey_service.transport.transports import Limits

LIMIT = 1_000
LEAST = int(PRESSURE_SHARE * LIMIT)
STEP = int(STEP_SHARE * LIMIT)


class Memory:
    """Memory of which a part is free but still belongs to the process."""

    def __init__(self, used: int, free: int = 0) -> None:
        self.used, self.free = used, free
        self.trims = 0

    def resident(self) -> int:
        return self.used + self.free

    def trim(self) -> None:
        self.trims += 1
        self.free = 0


def pressure(memory: Memory, limit: int = LIMIT) -> MemoryPressure:
    return MemoryPressure(limit, memory.resident, memory.trim)


def test_connections_end_only_above_the_threshold() -> None:
    """Below the threshold, there is nothing to do. Above it, connections end."""
    assert not pressure(Memory(LEAST - 1)).is_due(0.0)
    assert not pressure(Memory(10**12), limit=0).is_due(0.0)
    high = pressure(Memory(LEAST))
    assert high.is_due(0.0)
    assert high.judge(0.0)


def test_free_memory_ends_no_connection() -> None:
    """Memory that the allocator kept of an earlier burst goes back to the system instead."""
    memory = Memory(LEAST // 2, free=LEAST)
    judge = pressure(memory)
    assert judge.is_due(0.0)
    assert not judge.judge(0.0)
    assert memory.trims == 1
    assert not judge.is_due(TRIM_SECONDS)


def test_connections_end_again_only_after_further_growth() -> None:
    """A worker whose memory stays in use accepts new connections. If its memory keeps growing, more
    connections end. Once it was low, the first threshold applies again."""
    memory = Memory(LEAST)
    judge = pressure(memory)
    assert judge.judge(0.0)
    memory.used += STEP - 1
    assert not judge.is_due(0.1)
    memory.used += 1
    assert judge.is_due(0.2)
    assert judge.judge(0.2)
    memory.used = LEAST - STEP - 1
    assert not judge.is_due(0.3)
    memory.used = LEAST
    assert judge.is_due(0.4)
    assert judge.judge(0.4)


def test_memory_in_use_is_not_returned_again_and_again() -> None:
    """A return delays allocations, so a worker that needs its memory makes one attempt after its
    connections have ended, and the next one only after further growth."""
    memory = Memory(LEAST)
    judge = pressure(memory)
    assert judge.judge(0.0)
    assert judge.is_due(TRIM_SECONDS)
    assert not judge.judge(TRIM_SECONDS)
    assert not judge.is_due(10 * TRIM_SECONDS)
    assert memory.trims == 2
    memory.used, memory.free = LEAST + STEP // 2, STEP // 2
    assert judge.is_due(10 * TRIM_SECONDS)
    assert not judge.judge(10 * TRIM_SECONDS)
    memory.free = STEP // 2
    assert not judge.is_due(11 * TRIM_SECONDS)


def test_memory_near_the_threshold_is_not_returned_again_and_again() -> None:
    """A worker whose memory in use stays near the threshold returns free memory once, and not each
    time that it crosses the threshold."""
    memory = Memory(LEAST - 1, free=1)
    judge = pressure(memory)
    for now in range(5):
        if judge.is_due(float(now)):
            assert not judge.judge(float(now))
        assert not judge.is_due(now + 0.5)
        memory.free = 1
    assert memory.trims == 1


def test_the_level_follows_memory_below_the_threshold() -> None:
    """After a burst, a worker just below the threshold does not wait until memory is as short as
    in that burst."""
    memory = Memory(LIMIT - STEP)
    judge = pressure(memory)
    assert judge.judge(0.0)
    memory.used = LEAST - 1
    assert not judge.is_due(0.1)
    memory.used = LEAST - 1 + STEP
    assert judge.is_due(0.2)
    assert judge.judge(0.2)


def test_ended_connections_return_what_they_used() -> None:
    """After connections have ended, the memory that they used is returned within seconds."""
    memory = Memory(LEAST)
    judge = pressure(memory)
    assert judge.judge(0.0)
    memory.used, memory.free = LEAST // 2, LEAST // 2
    assert not judge.is_due(TRIM_SECONDS - 0.1)
    assert judge.is_due(TRIM_SECONDS)
    assert not judge.judge(TRIM_SECONDS)
    assert memory.resident() == LEAST // 2


def test_known_peers_are_kept_while_connected() -> None:
    """A peer that has shown its identity stays known until its connection has ended. One that
    showed it while the connections were being read is not forgotten."""
    known = KnownPeers()
    known.add("ipv4:1.2.3.4:5")
    assert "ipv4:1.2.3.4:5" in known
    known.keep(set())
    assert "ipv4:1.2.3.4:5" in known
    known.keep({"ipv4:1.2.3.4:5", "ipv4:9.9.9.9:9"})
    assert "ipv4:1.2.3.4:5" in known
    assert "ipv4:9.9.9.9:9" not in known
    known.keep({"ipv4:9.9.9.9:9"})
    assert "ipv4:1.2.3.4:5" not in known


def test_all_known_peers_may_be_forgotten() -> None:
    """Peers that showed their identity under an earlier policy are strangers until they show it
    again."""
    known = KnownPeers()
    known.add("ipv4:1.2.3.4:5")
    known.keep({"ipv4:1.2.3.4:5"})
    known.add("ipv4:1.2.3.4:6")
    known.clear()
    assert "ipv4:1.2.3.4:5" not in known
    assert "ipv4:1.2.3.4:6" not in known
    known.add("ipv4:1.2.3.4:5")
    assert "ipv4:1.2.3.4:5" in known


def test_an_inspection_that_fails_ends_connections_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no file descriptor is left for an inspection, the next one ends the connections, although
    the memory has not grown since."""
    own, failures = connection_guard._own, [OSError(errno.EMFILE, "no file descriptor")]

    def own_after_failures(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return own(*arguments)

    monkeypatch.setattr(connection_guard, "_own", own_after_failures)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        address = f"{host}:{port}"
        guard = ConnectionGuard(
            [address], Limits(), strict=[address], pressure=pressure(Memory(LEAST))
        )
        with socket.create_connection((host, port)) as client, listener.accept()[0]:
            with pytest.raises(OSError, match="no file descriptor"):
                guard.inspect()
            guard.inspect()
            assert guard.ended["memory"] == 1
            assert client.recv(1) == b""
            guard.inspect()
            assert guard.ended["memory"] == 1


def test_this_process_has_memory_and_can_return_it() -> None:
    """The real functions work here: the memory of this process is known."""
    trim()
    assert 10**7 < resident_bytes() < 10**11
