"""Knows which sessions have ended, so that a copy of a session's cookie is worthless afterwards.

A session is a sealed cookie, so the console must remember that it ended. Each process keeps the ids
of sessions that ended early. It sends each one to the other processes (`--peer`) at once. It
fetches theirs when it starts, and regularly, in case it was not reachable. The messages are sealed
with the keys that the processes share, so nobody else can read or make them.
"""

import asyncio
import heapq
import logging
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Final

import httpx2
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response

from latchkey_console.settings import Peer
from latchkey_console.state import StateKeys

__all__ = ["PEERS_PATH", "Ended", "Peers"]

_log = logging.getLogger("latchkey.console")

PEERS_PATH: Final = "/peers/ended"
# Sign-outs in one working day. An entry takes a hundred bytes. A full memory forgets the sessions
# that would have ended first anyway.
ENDED_MAX: Final = 20_000
# Time limit for a request to another process of the installation. A sign-out waits this long for
# one that does not answer.
PEER_SECONDS: Final = 2.0
# How long a process that missed a sign-out accepts a copy of its cookie, at most.
FETCH_SECONDS: Final = 15.0
# How long a message is valid. This allows for its travel time and for clocks that differ.
MESSAGE_SECONDS: Final = 60
# A message is the id of a session and a time, sealed. An answer contains up to ENDED_MAX of them.
MESSAGE_BYTES_MAX: Final = 1_024
ANSWER_BYTES_MAX: Final = 4_194_304

# Peers speak plain HTTP. Without this, each client would load all certification authorities, which
# stops the event loop for tens of milliseconds.
_NO_AUTHORITIES: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class Ended:
    """The ids of ended sessions, each with the time when it would have ended anyway."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        self._now = now
        self._until: dict[str, int] = {}

    def __contains__(self, session: str) -> bool:
        return session in self._until

    def add(self, session: str, until: int) -> None:
        """Remember a session until the time when it ends anyway, in seconds since 1970."""
        self.merge({session: until})

    def merge(self, sessions: Mapping[str, int]) -> None:
        """Remember several sessions."""
        now = int(self._now().timestamp())
        known = {**self._until, **sessions}
        known = {session: until for session, until in known.items() if until > now}
        if len(known) > ENDED_MAX:
            latest = heapq.nlargest(ENDED_MAX, known, key=known.__getitem__)
            known = {session: known[session] for session in latest}
        self._until = known

    def all(self) -> dict[str, int]:
        """Return all that are remembered."""
        self.merge({})
        return dict(self._until)


class Peers:
    """Exchanges ended sessions with the other processes."""

    def __init__(
        self,
        ended: Ended,
        peers: Sequence[Peer],
        keys: StateKeys,
        base_path: str,
        now: Callable[[], datetime],
        own: Peer | None = None,
    ) -> None:
        """`own` is where this process listens: it does not ask itself, which it cannot answer
        before it has started."""
        self._ended = ended
        self._peers = peers
        self._own = None if own is None else _url(own.host, own.port)
        self._path = f"{base_path}{PEERS_PATH}"
        self._asks = keys.box("ended sessions", now)
        # Sealed for separate purposes, so that nobody can pass one off as the other.
        self._answers = keys.box("answer: ended sessions", now)

    async def end(self, session: str, until: int) -> None:
        """End a session in all processes that can be reached."""
        self._ended.add(session, until)
        await self._exchange({session: until})

    async def serve(self, request: Request) -> Response:
        """Take another process's ended sessions, and answer with ours."""
        body = b""
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > MESSAGE_BYTES_MAX:
                    return PlainTextResponse("too large\n", 413)
        except ClientDisconnect:
            return PlainTextResponse("incomplete\n", 400)
        message = self._asks.open(body.decode("ascii", "replace"), MESSAGE_SECONDS)
        if "ended" not in message:
            return PlainTextResponse("not sealed with our keys\n", 403)
        self._ended.merge(message["ended"])
        return PlainTextResponse(self._answers.seal({"ended": self._ended.all()}))

    async def fetch_regularly(self) -> None:
        """Fetch the ended sessions of the other processes until cancelled."""
        while self._peers:
            await asyncio.sleep(FETCH_SECONDS)
            await self.fetch()

    async def fetch(self) -> None:
        """Fetch the ended sessions of the other processes."""
        await self._exchange({})

    async def _exchange(self, ended: Mapping[str, int]) -> None:
        async with httpx2.AsyncClient(
            timeout=PEER_SECONDS, trust_env=False, verify=_NO_AUTHORITIES
        ) as http:
            await asyncio.gather(*(self._ask_all(http, peer, ended) for peer in self._peers))

    async def _ask_all(
        self, http: httpx2.AsyncClient, peer: Peer, ended: Mapping[str, int]
    ) -> None:
        """Ask at each address of a peer."""
        # One end for the look-up of the name and for the answers.
        end = asyncio.get_running_loop().time() + PEER_SECONDS
        urls = await _addresses(peer, end)
        others = [url for url in urls if url != self._own]
        await asyncio.gather(*(self._ask(http, url, ended, end) for url in others))

    async def _ask(
        self, http: httpx2.AsyncClient, url: str, ended: Mapping[str, int], end: float
    ) -> None:
        try:
            async with asyncio.timeout_at(end):
                sealed = self._asks.seal({"ended": ended})
                answer = await http.post(f"{url}{self._path}", content=sealed)
        except (httpx2.HTTPError, TimeoutError) as error:
            _log.warning("peer %s does not answer: %s", url, type(error).__name__)
            return
        if answer.status_code != 200 or len(answer.content) > ANSWER_BYTES_MAX:
            _log.warning("peer %s answers %d", url, answer.status_code)
            return
        theirs = self._answers.open(answer.text, MESSAGE_SECONDS)
        if "ended" not in theirs:
            _log.warning(
                "peer %s has different keys in --state-key-file, or different options", url
            )
        self._ended.merge(theirs.get("ended", {}))


async def _addresses(peer: Peer, end: float) -> list[str]:
    """Return the URLs of a peer: one for each address of its name."""
    try:
        async with asyncio.timeout_at(end):
            found = await asyncio.get_running_loop().getaddrinfo(
                peer.host, peer.port, type=socket.SOCK_STREAM
            )
    except (OSError, TimeoutError, UnicodeError) as error:
        _log.warning("peer %s has no address: %s", peer.host, type(error).__name__)
        return []
    hosts = dict.fromkeys(str(address[0]) for *_, address in found)
    return [_url(host, peer.port) for host in hosts]


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
