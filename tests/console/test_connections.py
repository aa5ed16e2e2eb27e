"""Clients that send requests slowly, never finish them or never read do not block others."""

import asyncio
import contextlib
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from latchkey_console import connections

from tests.console.processes import Console, console, run
from tests.helpers.waiting import WAIT_SECONDS

HALF = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Endless: "
HALF_FORM = (
    b"POST /tokens HTTP/1.1\r\nHost: %s\r\nOrigin: http://%s\r\nContent-Length: 100\r\n"
    b"Content-Type: application/x-www-form-urlencoded\r\n\r\nname="
)


@pytest.fixture
def url(tmp_path: Path, address: str) -> Iterator[str]:
    with console(tmp_path / "page", "--account", "acme", "--target", address) as (_, url):
        yield url


@pytest.fixture
def transport() -> str:
    """The console cannot tell the transports apart, so one is enough here."""
    return "native"


def opened(stack: contextlib.ExitStack, url: str, number: int, sent: bytes) -> list[socket.socket]:
    """Open connections, and send the same on each."""
    where = httpx.URL(url)
    found = []
    for _ in range(number):
        one = stack.enter_context(socket.create_connection((where.host, where.port or 80)))
        one.settimeout(WAIT_SECONDS)
        one.sendall(sent)
        found.append(one)
    return found


@pytest.mark.parametrize("sent", ["nothing", "head", "form"])
async def test_half_sent_requests_keep_nobody_out(url: str, sent: str) -> None:
    """With more unfinished requests than may run, and more connections than may be open, pages,
    forms and the probe are served. The oldest connections make room."""
    # In a thread, because the service, which the form asks for its limits, runs in this process.
    await asyncio.to_thread(check_others_are_served, url, sent)


def check_others_are_served(url: str, sent: str) -> None:
    host = url.removeprefix("http://").encode()
    begun = {"nothing": b"", "head": HALF, "form": HALF_FORM % (host, host)}[sent]
    number = connections.CONNECTIONS_MAX + 10
    assert number > connections.REQUESTS_MAX
    with contextlib.ExitStack() as stack:
        held = opened(stack, url, number, begun)
        assert httpx.get(f"{url}/healthz", timeout=WAIT_SECONDS).text == "ok\n"
        assert httpx.get(f"{url}/new", timeout=WAIT_SECONDS).status_code == 200
        with contextlib.suppress(ConnectionResetError):
            assert held[0].recv(1) == b""
        held[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            held[-1].recv(1)


# The time is shorter, or the test would take most of a minute.
IMPATIENT = """
import sys
from latchkey_console import connections
from latchkey_cli.main import main

connections.RECEIVE_SECONDS = 2.0
sys.exit(main())
"""


def test_a_request_must_arrive_in_time(tmp_path: Path) -> None:
    """A connection that sends a byte now and then is closed when its time is over, even after a
    first complete request."""
    start = (sys.executable, "-c", IMPATIENT)
    running = Console(tmp_path / "page", "--account", "acme", start=start)
    try:
        check_patience(run(running.url()))
    finally:
        running.end()


def check_patience(url: str) -> None:
    host = url.removeprefix("http://").encode()
    whole = b"GET /healthz HTTP/1.1\r\nHost: %s\r\n\r\n" % host
    with contextlib.ExitStack() as stack:
        (first,) = opened(stack, url, 1, HALF)
        (second,) = opened(stack, url, 1, whole)
        assert second.recv(65_536).startswith(b"HTTP/1.1 200")
        second.sendall(HALF)
        began = time.monotonic()
        for one in (first, second):
            one.settimeout(0.1)
            while True:
                with contextlib.suppress(TimeoutError):
                    try:
                        one.sendall(b"x")
                        if not one.recv(1):
                            break
                    except (ConnectionResetError, BrokenPipeError):
                        break
                assert time.monotonic() - began < WAIT_SECONDS
