"""Stand-ins for parts of the service's domain, for tests of one part."""

from latchkey_service.audit.audit_log import AuditContext
from latchkey_service.coherence.reads import LeasedReads, ReadBegan
from latchkey_service.coherence.snapshot import Snapshot
from latchkey_service.tokens.batched_lookup import Found, Lookup

__all__ = ["BelievedReads", "audit_context", "find"]


class BelievedReads(LeasedReads):
    """Accepts every read: for tests of one database, without a verifier that holds a lease."""

    def __init__(self) -> None:
        """Needs nothing."""

    async def begin(self, deadline: float) -> ReadBegan:
        """Return at once."""
        return ReadBegan(0, 0)

    async def accept(self, snapshot: Snapshot, began: ReadBegan, deadline: float) -> None:
        """Return at once."""


def audit_context(method: str = "Create") -> AuditContext:
    """The audit context for a change that bypasses the servicer."""
    return AuditContext("", f"/latchkey.v1.TokenService/{method}", "unix:", "request", "", "")


async def find(lookup: Lookup, digest: bytes, deadline: float) -> Found:
    """Look up one token. `deadline` is on the look-up's clock."""
    (found,) = await lookup.find_all((digest,), deadline)
    return found
