"""Sessions that ended: what each process remembers, and what processes tell each other."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest
import uvicorn
from latchkey_console import ended as module
from latchkey_console.ended import PEERS_PATH, Ended, Peers
from latchkey_console.settings import Peer
from latchkey_console.state import StateKeys
from starlette.applications import Starlette
from starlette.routing import Route

from tests.helpers.plain_http import NO_AUTHORITIES
from tests.helpers.waiting import eventually
from tests.unit.console.scripted import NOW

KEYS = StateKeys([b"k" * 32])
UNTIL = int(NOW.timestamp()) + 600


def now() -> datetime:
    return NOW


@asynccontextmanager
async def serving(peers: Peers) -> AsyncIterator[Peer]:
    """Serve a process's side of the exchange. Yield where it listens."""
    app = Starlette(routes=[Route(f"/base{PEERS_PATH}", peers.serve, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    running = asyncio.create_task(server.serve())
    try:
        await eventually(lambda: server.started, "the server")
        yield Peer("127.0.0.1", server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        await running


def peers_of(ended: Ended, *others: Peer, keys: StateKeys = KEYS, base: str = "/base") -> Peers:
    return Peers(ended, others, keys, base, now)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session is remembered until it would have ended anyway. A full memory forgets those that
    would have ended first."""
    moment = NOW
    ended = Ended(lambda: moment)
    monkeypatch.setattr(module, "ENDED_MAX", 3)
    ended.add("over", int(NOW.timestamp()))
    assert "over" not in ended
    for number in (3, 1, 2, 4):
        ended.add(str(number), UNTIL + number)
    ended.add("4", UNTIL + 4)
    assert sorted(ended.all()) == ["2", "3", "4"]
    assert ("1" in ended, "4" in ended) == (False, True)
    moment = NOW + timedelta(seconds=603)
    assert ended.all() == {"4": UNTIL + 4}


def test_full_memory_forgets_no_later_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a full memory, a session that ends earlier does not take the place of a later one."""
    ended = Ended(now)
    monkeypatch.setattr(module, "ENDED_MAX", 2)
    ended.merge({"2": UNTIL + 2, "3": UNTIL + 3})
    ended.merge({"0": UNTIL, "1": UNTIL + 1})
    ended.add("4", UNTIL + 4)
    assert sorted(ended.all()) == ["3", "4"]


async def test_peer_has_one_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sign-out waits for a peer for at most PEER_SECONDS, even if its name is looked up slowly
    and it then does not answer. The others hear of the sign-out nevertheless."""
    monkeypatch.setattr(module, "PEER_SECONDS", 1.0)
    loop = asyncio.get_running_loop()
    look_up = loop.getaddrinfo

    async def slow(host: str, *arguments: Any, **options: Any) -> Any:
        if host != "slow.example":
            return await look_up(host, *arguments, **options)
        await asyncio.sleep(0.8)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", silent.getsockname())]

    monkeypatch.setattr(loop, "getaddrinfo", slow)
    here, there = Ended(now), Ended(now)
    # It accepts connections, and nobody answers there.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent_peer = Peer("slow.example", silent.getsockname()[1])
        async with serving(peers_of(there)) as peer:
            began = loop.time()
            await peers_of(here, silent_peer, peer).end("session", UNTIL)
            assert loop.time() - began < 1.4
    assert "session" in there


async def test_process_does_not_ask_itself(caplog: pytest.LogCaptureFixture) -> None:
    """A process that is its own peer does not wait for itself when it starts."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        own = Peer("127.0.0.1", listener.getsockname()[1])
        await Peers(Ended(now), (own,), KEYS, "", now, own).fetch()
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    # Other servers of the session log here too.
    assert not [each for each in caplog.records if each.name.startswith("latchkey.console")]


async def test_sign_out_counts_in_the_other_process() -> None:
    """When `end` returns, the other process knows it. A process that starts later asks for it."""
    here, there, late = Ended(now), Ended(now), Ended(now)
    there.add("earlier", UNTIL)
    async with serving(peers_of(there)) as peer:
        await peers_of(here, peer).end("session", UNTIL)
        assert "session" in there
        assert "earlier" in here
        await peers_of(late, peer).fetch()
    assert late.all() == {"session": UNTIL, "earlier": UNTIL}


async def test_missed_sign_out_arrives_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that could not be reached fetches what it missed."""
    monkeypatch.setattr(module, "FETCH_SECONDS", 0.01)
    here, there = Ended(now), Ended(now)
    async with serving(peers_of(here)) as peer:
        fetching = asyncio.create_task(peers_of(there, peer).fetch_regularly())
        here.add("session", UNTIL)
        await eventually(lambda: "session" in there, "the session")
        fetching.cancel()


@pytest.mark.parametrize("message", ["", "forged", "é" * 100, "x" * 5_000, "another key", "answer"])
async def test_only_processes_with_the_key_are_heard(message: str) -> None:
    """A message that was not sealed with the shared keys changes and reveals nothing."""
    there = Ended(now)
    there.add("secret-id", UNTIL)
    if message == "another key":
        message = StateKeys([b"x" * 32]).box("ended sessions", now).seal({"ended": {"a": UNTIL}})
    elif message == "answer":
        message = KEYS.box("answer: ended sessions", now).seal({"ended": {"a": UNTIL}})
    async with serving(peers_of(there)) as peer, httpx.AsyncClient(verify=NO_AUTHORITIES) as client:
        url = f"http://127.0.0.1:{peer.port}/base{PEERS_PATH}"
        answer = await client.post(url, content=message.encode())
    assert answer.status_code in (403, 413)
    assert "secret-id" not in answer.text
    assert list(there.all()) == ["secret-id"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda peer: {"others": (Peer("127.0.0.1", 1),)}, "does not answer"),
        (lambda peer: {"others": (Peer("no.such.name.invalid", 1),)}, "has no address"),
        (lambda peer: {"others": (peer,), "base": "/elsewhere"}, "answers 404"),
        (lambda peer: {"others": (peer,), "keys": StateKeys()}, "answers 403"),
    ],
)
async def test_unreachable_peer_is_logged(
    change: Callable[[Peer], dict[str, Any]], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A sign-out completes here whatever the other process does, and the log says what is wrong."""
    here = Ended(now)
    async with serving(peers_of(Ended(now))) as peer:
        options = change(peer)
        await peers_of(here, *options.pop("others"), **options).end("session", UNTIL)
    assert "session" in here
    assert words in caplog.text
    assert "session" not in caplog.text.replace("ended sessions", "")
