"""The hosts of a database URL, one of which is the primary: which one is asked first."""

import re
from typing import TYPE_CHECKING, Any, Final

import asyncpg
from asyncpg.connect_utils import SessionAttribute

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Hosts", "each_host"]

_HOSTS: Final = re.compile(r"(\w+://(?:[^/?#]*@)?)([^/?#@]*)(.*)", re.DOTALL)
# What a host may answer, or not, that is not the primary, or is none yet. Others may be.
_NEXT: Final = (
    OSError,  # TimeoutError included
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
# Of several failures these are told: they do not pass by themselves.
_TELLING: Final = (
    asyncpg.InvalidAuthorizationSpecificationError,  # a wrong password included
    asyncpg.InvalidCatalogNameError,
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

    async def connect(self, **options: Any) -> "Connection":
        """Return a connection to the primary. `options` are asyncpg's, of each attempt.

        Raises what asyncpg does: of several failures the one that most wants to be mended.
        """
        failures: list[Exception] = []
        for url in self._urls:
            try:
                return await self._connect(url, options)
            except asyncpg.ClientConfigurationError:
                # The URL's or the environment's, and so of all of them.
                raise
            except _NEXT as error:
                failures.append(error)
        telling = [error for error in failures if isinstance(error, _TELLING)]
        raise (telling or failures)[-1]

    async def _connect(self, url: str, options: dict[str, Any]) -> "Connection":
        # Never a standby, which may be behind: it would answer VALID for a token that is deleted.
        connection: Connection = await asyncpg.connect(
            url, target_session_attrs=SessionAttribute.primary, **options
        )
        self._urls = [url, *(other for other in self._urls if other != url)]
        return connection
