"""The hosts of a database URL, one of which is the primary: which one is asked first."""

import asyncio
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from latchkey_service.postgres import sessions

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["CONNECT_ERRORS", "Hosts", "each_host", "is_permanent"]

# For an attempt whose caller names no other time-out.
TIMEOUT_SECONDS: Final = 5.0
# A connection that took nearly all of its time still gets one round trip.
SETTINGS_SECONDS_MIN: Final = 0.1

_HOSTS: Final = re.compile(r"(\w+://(?:[^/?#]*@)?)([^/?#@]*)(.*)", re.DOTALL)
# What a host may answer, or not, that is not the primary, or is none yet. Others may be.
CONNECT_ERRORS: Final = (
    OSError,  # TimeoutError included
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
_NO_SETTINGS: Final[Mapping[str, str]] = MappingProxyType({})
# PgBouncer reports nearly everything with SQLSTATE 08P01. These messages of its stand for what
# passes, as a rule: Postgres is away or starting, PgBouncer is stopping or full.
_PASSING: Final = re.compile(
    r"cannot connect|login|starting up|shutting down|pause|timeout|exceeded|exhaustion|disabled"
    r"|out of memory|no more connections",
    re.IGNORECASE,
)
# Among those, what does not pass: a pooler's login at the server includes the reason.
_LASTING: Final = re.compile("authentication failed|unsupported", re.IGNORECASE)


def is_permanent(error: BaseException) -> bool:
    """Return whether a failure to connect stays until a person changes something."""
    if isinstance(error, asyncpg.ProtocolViolationError):
        message = str(error)
        return bool(_LASTING.search(message)) or not _PASSING.search(message)
    return isinstance(
        error,
        asyncpg.InvalidAuthorizationSpecificationError  # a wrong password included
        | asyncpg.InvalidCatalogNameError
        | asyncpg.ClientConfigurationError,  # the URL
    )


def each_host(database_url: str) -> list[str]:
    """Return a URL for each host of `database_url`, in its order."""
    match = _HOSTS.fullmatch(database_url)
    if match is None:
        return [database_url]
    before, hosts, after = match.groups()
    return [before + host + after for host in hosts.split(",")]


class Hosts:
    """Connects to whichever is the primary, beginning with the one that was the last time.

    One after the other, each with the whole time-out: asyncpg (0.32) has one for all, so that a
    host which takes connections and says nothing, or whose machine is gone, would keep it from the
    others.
    """

    def __init__(self, database_url: str) -> None:
        self._urls = each_host(database_url)
        # The one that a commit was durable on. Only that says which host is the primary: after a
        # failover, the deposed one may go on saying that it is.
        self._proved: str | None = None
        self._url_of: WeakKeyDictionary[Connection, str] = WeakKeyDictionary()

    def names(self) -> list[str]:
        """Return the hosts, as the URL has them, in the order in which they are asked."""
        return [_name(url) for url in self._urls]

    def name_of(self, connection: "Connection") -> str:
        """Return the host that a connection was made to."""
        return _name(self._url_of[connection])

    def prove(self, connection: "Connection") -> None:
        """Ask a connection's host first, whatever other hosts say."""
        if self._proved != (url := self._url_of[connection]):
            self._proved = url
            self._prefer(url)

    def leave(self, connection: "Connection") -> None:
        """Ask a connection's host last."""
        url = self._url_of[connection]
        if self._proved in (url, None):
            self._proved = None
            self._urls = [*(other for other in self._urls if other != url), url]

    async def connect_to(self, host: str, **options: Any) -> "Connection":
        """Return a connection to one host, which has to be a primary. Raises what asyncpg does."""
        for url in self._urls:
            if _name(url) == host:
                return await self._connect(url, _NO_SETTINGS, options)
        raise ValueError(f"{host} is not in the list")

    async def connect(
        self, settings: Mapping[str, str] = _NO_SETTINGS, **options: Any
    ) -> "Connection":
        """Return a connection to the primary, with `settings` of the session.

        `options` are asyncpg's. Their `timeout` covers connecting and the settings, at each host.
        Raises what asyncpg does: of several failures the one that most wants to be mended.
        """
        failures: list[Exception] = []
        for url in self._urls:
            try:
                connection = await self._connect(url, settings, options)
            except asyncpg.ClientConfigurationError:
                # The URL's or the environment's, and so of all of them.
                raise
            except CONNECT_ERRORS as error:
                failures.append(error)
            else:
                if self._proved is None:
                    self._prefer(url)
                return connection
        raise next(filter(is_permanent, reversed(failures)), failures[-1])

    async def _connect(
        self, url: str, settings: Mapping[str, str], options: dict[str, Any]
    ) -> "Connection":
        loop = asyncio.get_running_loop()
        end = loop.time() + options.get("timeout", TIMEOUT_SECONDS)
        # Any, whatever the URL or the environment asks for: `prepare` refuses a standby.
        connection: Connection = await asyncpg.connect(
            url, target_session_attrs=SessionAttribute.any, **options
        )
        try:
            left = max(end - loop.time(), SETTINGS_SECONDS_MIN)
            await sessions.prepare(connection, settings, left)
        except BaseException:
            connection.terminate()
            raise
        self._url_of[connection] = url
        return connection

    def _prefer(self, url: str) -> None:
        self._urls = [url, *(other for other in self._urls if other != url)]


def _name(url: str) -> str:
    """Return the host and the port of a URL of one host, without role and password."""
    match = _HOSTS.fullmatch(url)
    return match[2] if match else ""
