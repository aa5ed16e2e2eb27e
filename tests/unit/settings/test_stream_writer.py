"""A stream whose reader hangs, fails or comes back."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from latchkey_service.settings.stream_writer import StreamWriter

from tests.helpers.waiting import WAIT_SECONDS, eventually

LINE = b"x" * 99 + b"\n"
# More than any pipe holds (Linux: 64 KiB, or up to 1 MiB).
MANY = 20_000


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    for file in (read, write):
        os.close(file)


def read_lines(file: int, stop: threading.Event, found: list[bytes]) -> None:
    while not stop.is_set():
        found.append(os.read(file, 65_536))


async def test_a_reader_that_hangs_and_returns(pipe: tuple[int, int]) -> None:
    """Nobody waits for a reader that hangs. The lines that fit are written when it returns, the
    others are counted, and their number is reported after them."""
    read, write = pipe
    reports: list[int] = []
    writer = StreamWriter(write, bytes_max=50 * len(LINE))
    writer.on_dropped = reports.append
    writer.start()
    began = time.monotonic()
    for _ in range(MANY):
        writer.put(LINE)
    assert time.monotonic() - began < WAIT_SECONDS / 4
    assert writer.dropped > 0
    found: list[bytes] = []
    stop = threading.Event()
    reader = threading.Thread(target=read_lines, args=(read, stop, found), daemon=True)
    reader.start()
    expected = (MANY - writer.dropped) * len(LINE)
    await eventually(lambda: sum(map(len, found)) == expected, "the lines that fit arrive")
    await eventually(lambda: sum(reports) == writer.dropped, "the others are reported")
    stop.set()
    writer.put(LINE)
    reader.join(WAIT_SECONDS)
    assert set(b"".join(found).splitlines(keepends=True)) == {LINE}


def test_the_end_does_not_wait_for_a_reader_that_hangs(pipe: tuple[int, int]) -> None:
    """At its end, the process waits only a bounded time for a reader that hangs."""
    writer = StreamWriter(pipe[1])
    for _ in range(MANY):
        writer.put(LINE)
    began = time.monotonic()
    writer.stop(0.2)
    assert 0.2 <= time.monotonic() - began < WAIT_SECONDS / 4
    # Lets the thread end.
    os.set_blocking(pipe[0], False)
    for _ in range(MANY):
        try:
            if not os.read(pipe[0], 1_048_576):
                break
        except BlockingIOError:
            if not writer._bytes:
                break
            time.sleep(0.001)


def test_lines_wait_for_the_start(tmp_path: Path) -> None:
    """Lines from before the start are written, in order, and the end waits for the last one."""
    with (tmp_path / "log").open("wb") as file:
        writer = StreamWriter(file.fileno())
        for number in range(100):
            writer.put(b"%d\n" % number)
        assert (tmp_path / "log").stat().st_size == 0
        writer.stop()
    assert (tmp_path / "log").read_bytes().split() == [b"%d" % n for n in range(100)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_full_disk_costs_lines_only() -> None:
    """Lines that cannot be written are counted, and the next ones are tried."""
    with Path("/dev/full").open("wb", buffering=0) as full:
        writer = StreamWriter(full.fileno())
        writer.put(LINE)
        writer.put(LINE)
        writer.stop()
        assert writer.dropped == 2


def test_a_stream_that_does_not_block(pipe: tuple[int, int]) -> None:
    """A stream that another program has made non-blocking loses nothing."""
    read, write = pipe
    os.set_blocking(write, False)
    writer = StreamWriter(write)
    size = 2_000 * len(LINE)
    writer.put(LINE * 2_000)
    writer.start()
    found = b""
    while len(found) < size:
        found += os.read(read, 65_536)
    assert found == LINE * 2_000
    writer.stop()
    assert writer.dropped == 0


def test_its_thread_handles_no_signals(pipe: tuple[int, int]) -> None:
    """The kernel gives no signal of the process to the thread: its handler could write to the pipe
    of an event loop that has been closed."""
    read, write = pipe
    writer = StreamWriter(write)
    writer.put(LINE)
    before = set(threading.enumerate())
    writer.start()
    (thread,) = set(threading.enumerate()) - before
    # The thread has begun.
    assert os.read(read, len(LINE)) == LINE
    status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    blocked = next(line for line in status.splitlines() if line.startswith("SigBlk:"))
    mask = int(blocked.split()[1], 16)
    writer.stop()
    assert all(mask & 1 << (number - 1) for number in (signal.SIGINT, signal.SIGTERM))
