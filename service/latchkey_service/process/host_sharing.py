"""How the workers of a host can share one lease: worker 0 leads, the others are its siblings.

Owns the private socket's folder, the variables by which a worker learns its part, and the assembly
of a sibling's row. The rules are in `coherence/host_lead.py` and `coherence/host_rows.py`.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from latchkey_coherence.lease import boottime

from latchkey_service.coherence.host_lead import HostLead
from latchkey_service.coherence.host_rows import HostRows
from latchkey_service.coherence.lead_server import LeadServer
from latchkey_service.coherence.lease_renewer import LeaseRenewer
from latchkey_service.coherence.notify_listener import NotifyListener
from latchkey_service.coherence.primary import Primary
from latchkey_service.coherence.rows import PostgresRows, Rows
from latchkey_service.coherence.verifier_table import Identity
from latchkey_service.postgres.embedded_host import OsAccount
from latchkey_service.process.periodic import PROBE_SECONDS, PROBE_SECONDS_SHARED
from latchkey_service.settings.logs import logger
from latchkey_service.settings.settings import Settings

__all__ = ["HostSharing", "host_folder", "variables"]

# In a worker's environment: the path of the socket, and whether the worker is the lead.
SOCKET_VARIABLE: Final = "LATCHKEY_HOST_SOCKET"
LEAD_VARIABLE: Final = "LATCHKEY_HOST_LEAD"


@contextlib.contextmanager
def host_folder(settings: Settings, account: OsAccount | None) -> Iterator[str | None]:
    """Create the folder of the socket for the workers' account, and delete it afterwards.

    Yields None if the workers share no lease. Without a folder, each worker has its own row.
    """
    if not settings.shares_lease:
        yield None
        return
    try:
        # Only for this account: mode 0700.
        folder = tempfile.TemporaryDirectory(prefix="lk-host-", ignore_cleanup_errors=True)
    except OSError as error:
        logger().warning("the workers share no lease", error=str(error))
        yield None
        return
    with folder as path:
        if account is not None:
            os.chown(path, account.uid, account.gid)
        yield path


def variables(folder: str | None, number: int) -> Mapping[str, str]:
    """Return the variables for worker `number`."""
    if folder is None:
        return {}
    return {SOCKET_VARIABLE: str(Path(folder, "lead")), LEAD_VARIABLE: str(int(number == 0))}


class HostSharing:
    """A worker's part: the lead, a sibling, or alone. `serve` comes after `rows`."""

    def __init__(
        self,
        environment: Mapping[str, str],
        identity: Identity,
        primary: Primary,
        listener: NotifyListener,
    ) -> None:
        path = environment.get(SOCKET_VARIABLE)
        leads = environment.get(LEAD_VARIABLE) == "1"
        self.probe_seconds = PROBE_SECONDS if path is None else PROBE_SECONDS_SHARED
        """Between the checks for health."""
        self._socket = path
        self._upkeep = leads or path is None
        self._identity = identity
        self._primary = primary
        self._listener = listener
        self._postgres = PostgresRows(identity, primary, listener.connect)
        self._lead: LeadServer | None = None

    def rows(self, renewer: Callable[[], LeaseRenewer]) -> Rows:
        """Return where the worker has its row."""
        if self._socket is None or self._upkeep:
            return self._postgres

        def on_news(kind: str) -> None:
            if kind == "unasked log":
                renewer().wake_to_apply()
            else:
                # A renewal returns all that the lead has read, without a question to Postgres.
                renewer().renew_now()

        identity = self._identity
        return HostRows(
            self._socket,
            {"id": identity.id, "process_id": identity.process_id, "start_time": time.time()},
            identity.lease_seconds,
            self._postgres,
            boottime,
            on_news,
            self._primary.shared,
            self._listener.disconnected,
        )

    def serve(
        self,
        renewer: LeaseRenewer,
        on_news: Callable[[bool], None],
        on_released: Callable[[], None],
    ) -> Callable[[bool], None]:
        """Return what the renewer calls after each read of the log: `on_news`, and if this worker
        is the lead, the siblings. `on_released` is called when a sibling has released its lease.
        """
        if self._socket is None or not self._upkeep:
            return on_news
        primary, postgres = self._primary, self._postgres
        rules = HostLead(renewer.state, lambda: postgres.row.incarnation)
        self._lead = lead = LeadServer(
            self._socket,
            rules,
            renewer,
            boottime,
            self._identity.id,
            lambda: primary.host,
            on_released,
        )
        renewer.attach_siblings(lead.reports, lead.counts)

        def on_all_news(changed: bool) -> None:  # noqa: FBT001 - called back
            on_news(changed)
            lead.on_news(changed)

        return on_all_news

    def upkeep(
        self, works: Callable[[], list[Coroutine[Any, Any, None]]]
    ) -> list[Coroutine[Any, Any, None]]:
        """Return the works that one worker of a host does."""
        return works() if self._upkeep else []

    async def start(self) -> None:
        """Listen for siblings, if this worker is the lead."""
        if self._lead is not None:
            await self._lead.start()

    def close_to_siblings(self) -> None:
        """Ask siblings to register their own rows."""
        if self._lead is not None:
            self._lead.close_to_siblings()

    async def stop(self) -> None:
        """Close the connections of siblings."""
        if self._lead is not None:
            await self._lead.stop()
