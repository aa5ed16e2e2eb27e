"""How the workers of a host share one lease: worker 0 leads, the others are its siblings.

Owns the private socket's folder, the variables by which a worker learns its part, and the assembly
of a sibling's row. The rules are in `coherence/host_lead.py` and `coherence/host_rows.py`.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

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
from latchkey_service.settings.logs import logger
from latchkey_service.settings.settings import Settings

__all__ = ["Share", "host_folder", "lead_of", "rows_of", "share_of", "variables"]

# In a worker's environment: the path of the socket, and whether the worker is the lead.
SOCKET_VARIABLE: Final = "LATCHKEY_HOST_SOCKET"
LEAD_VARIABLE: Final = "LATCHKEY_HOST_LEAD"


class Share(NamedTuple):
    """A worker's part."""

    path: str
    leads: bool


@contextlib.contextmanager
def host_folder(settings: Settings, account: OsAccount | None) -> Iterator[str | None]:
    """Create the folder of the socket for the workers' account, and delete it afterwards.

    Yields None if there is a single worker. Without a folder, each worker has a row of its own.
    """
    if settings.workers < 2:
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


def share_of(environment: Mapping[str, str]) -> Share | None:
    """Return a worker's part, or None if it has a row of its own."""
    path = environment.get(SOCKET_VARIABLE)
    return None if path is None else Share(path, environment.get(LEAD_VARIABLE) == "1")


def rows_of(
    share: Share | None,
    identity: Identity,
    postgres: PostgresRows,
    primary: Primary,
    listener: NotifyListener,
    renewer: Callable[[], LeaseRenewer],
) -> Rows:
    """Return where a worker has its row."""
    if share is None or share.leads:
        return postgres

    def on_news(kind: str) -> None:
        if kind == "log":
            renewer().wake()
        else:
            renewer().renew_now()

    return HostRows(
        share.path,
        {"id": identity.id, "process_id": identity.process_id, "start_time": time.time()},
        identity.lease_seconds,
        postgres,
        boottime,
        on_news,
        primary.shared,
        listener.disconnected,
    )


def lead_of(
    share: Share | None,
    renewer: LeaseRenewer,
    postgres: PostgresRows,
    primary: Primary,
    on_released: Callable[[], None],
) -> LeadServer:
    """Return what serves the siblings of a worker. It does not listen if there are none."""
    lead = LeadServer(
        share.path if share is not None and share.leads else None,
        HostLead(renewer.state, lambda: postgres.row.incarnation),
        renewer,
        boottime,
        postgres.row.id,
        lambda: primary.host,
        on_released,
    )
    renewer.attach_siblings(lead.reports, lead.counts)
    return lead
