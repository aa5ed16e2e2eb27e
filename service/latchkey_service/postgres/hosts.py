"""Finds the primary among the hosts of a database URL.

Owns the order in which hosts are tried. It does not limit or repeat attempts (`connections.py`).
"""

import asyncio
import re
import ssl
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from latchkey_service.postgres import sessions
from latchkey_service.settings import database_url

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["CONNECT_ERRORS", "Hosts", "each_host", "is_permanent"]

# Default time-out of an attempt.
TIMEOUT_SECONDS: Final = 5.0
# Leaves time for one round trip even if connecting took nearly the whole time-out.
SETTINGS_SECONDS_MIN: Final = 0.1

_HOSTS: Final = re.compile(r"(\w+://(?:[^/?#]*@)?)([^/?#@]*)(.*)", re.DOTALL)
# Errors of a host that is not, or not yet, the primary. Another host may be the primary.
CONNECT_ERRORS: Final = (
    OSError,  # TimeoutError included
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
_NO_SETTINGS: Final[Mapping[str, str]] = MappingProxyType({})
# PgBouncer reports nearly every error with SQLSTATE 08P01. These messages usually mean a transient
# failure: Postgres is unreachable or starting, PgBouncer is stopping or full.
_PASSING: Final = re.compile(
    r"cannot connect|login|starting up|shutting down|pause|timeout|exceeded|exhaustion|disabled"
    r"|out of memory|no more connections",
    re.IGNORECASE,
)
# Exceptions to those: a pooler that fails to log in at the server includes the server's reason.
_LASTING: Final = re.compile("authentication failed|unsupported", re.IGNORECASE)


def is_permanent(error: BaseException) -> bool:
    """Return whether a failure to connect lasts until a person changes something."""
    if isinstance(error, asyncpg.ProtocolViolationError):
        message = str(error)
        return bool(_LASTING.search(message)) or not _PASSING.search(message)
    if type(error) is ConnectionError:
        # The driver's only way to say that the server has no TLS.
        return "rejected SSL upgrade" in str(error)
    return isinstance(
        error,
        ssl.SSLCertVerificationError  # the name or the CA
        | asyncpg.InvalidAuthorizationSpecificationError  # includes a wrong password
        | asyncpg.InvalidCatalogNameError
        | asyncpg.ClientConfigurationError,  # the URL
    )


def each_host(url: str) -> list[str]:
    """Return one URL for each host of `url`, in the same order."""
    match = _HOSTS.fullmatch(url)
    if match is None:
        return [url]
    before, hosts, after = match.groups()
    return [before + host + after for host in hosts.split(",")]


class Hosts:
    """Connects to the primary. Tries the host that was the primary last time first.

    Tries one host after another, each with the whole time-out. asyncpg (0.32) applies one time-out
    to all hosts, so a host that accepts connections but never answers, or whose machine is gone,
    would keep asyncpg from reaching the others.
    """

    def __init__(self, url: str) -> None:
        self._urls = each_host(database_url.for_driver(url))
        context = database_url.tls_context(url)
        self._tls: dict[str, Any] = {} if context is None else {"ssl": context}
        # The host of the latest durable commit. Only such a commit proves that a host is the
        # primary: after a failover, the deposed primary may still claim to be.
        self._proved: str | None = None
        self._url_of: WeakKeyDictionary[Connection, str] = WeakKeyDictionary()

    def names(self) -> list[str]:
        """Return the hosts, spelled as in the URL, in the order in which they are tried."""
        return [_name(url) for url in self._urls]

    def name_of(self, connection: "Connection") -> str:
        """Return the host that a connection leads to."""
        return _name(self._url_of[connection])

    def prove(self, host: "Connection | str") -> None:
        """From now on, try this host, or the host of this connection, first, whatever other hosts
        claim."""
        if isinstance(host, str):
            url = next((url for url in self._urls if _name(url) == host), None)
        else:
            url = self._url_of[host]
        if url is not None and self._proved != url:
            self._proved = url
            self._prefer(url)

    def leave(self, connection: "Connection") -> None:
        """Try the host of `connection` last from now on."""
        url = self._url_of[connection]
        if self._proved in (url, None):
            self._proved = None
            self._urls = [*(other for other in self._urls if other != url), url]

    async def connect_to(self, host: str, **options: Any) -> "Connection":
        """Return a connection to one host, which must be a primary. Raises asyncpg's errors."""
        for url in self._urls:
            if _name(url) == host:
                return await self._connect(url, _NO_SETTINGS, options)
        raise ValueError(f"{host} is not a host of the database URL")

    async def connect(
        self, settings: Mapping[str, str] = _NO_SETTINGS, **options: Any
    ) -> "Connection":
        """Return a connection to the primary, with the session's `settings` applied.

        `options` are asyncpg's. Their `timeout` covers connecting and the settings, per host.
        Raises asyncpg's errors: of several failures, one that a person has to fix if there is one.
        """
        failures: list[Exception] = []
        for url in self._urls:
            try:
                connection = await self._connect(url, settings, options)
            except asyncpg.ClientConfigurationError:
                # Caused by the URL or the environment, so every host would fail.
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
        # Overrides the URL and the environment: `prepare` rejects standbys.
        try:
            connection: Connection = await asyncpg.connect(
                url, target_session_attrs=SessionAttribute.any, **self._tls, **options
            )
        except KeyError as error:
            # From `getpass.getuser`, in a container whose user is only a number.
            raise asyncpg.ClientConfigurationError(
                "the URL names no user, and the user of this process has no name"
            ) from error
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
    """Return host and port of a URL with one host, without role and password."""
    match = _HOSTS.fullmatch(url)
    return match[2] if match else ""
