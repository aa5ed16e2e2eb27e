"""The outbox of the webhook: the part of a statement that writes an event with the change.

The statement that makes a change also writes its event, so an event is there if and only if the
change is, without another round trip. `event_store.py` takes the events out again.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

__all__ = [
    "CREATED",
    "DELETED",
    "EVENT_TYPES",
    "EXPIRING",
    "LEAKED",
    "NO_EVENTS",
    "REVOKED",
    "ROTATED",
    "Outbox",
]

CREATED: Final = "created"
DELETED: Final = "deleted"
EXPIRING: Final = "expiring"
LEAKED: Final = "leaked"
REVOKED: Final = "revoked"
ROTATED: Final = "rotated"
# Those that change one token that exists.
_TYPE_OF_METHOD: Final = MappingProxyType(
    {
        "Update": "updated",
        "Disable": "disabled",
        "Enable": "enabled",
        "Rotate": ROTATED,
        "RetireSecrets": "retired",
    }
)
# In the order of a token's life, for documentation.
EVENT_TYPES: Final = (
    *(CREATED, "updated", ROTATED, "retired", "disabled", "enabled"),
    *(EXPIRING, LEAKED, REVOKED, DELETED),
)
_COLUMNS: Final = "type, time, account_id, token_id, name, expire_time, caller"


@dataclass(frozen=True, slots=True)
class Outbox:
    """Which events to write. Event loop only."""

    wanted: frozenset[str]

    def insert_for(self, method: str, rows: str) -> str:
        """Return the WITH query that writes the events of a change, or an empty text.

        `method` is the full name of an RPC that changes one token. See `insert` for `rows`.
        """
        return self.insert(_TYPE_OF_METHOD.get(method.rpartition("/")[2], ""), rows)

    def insert(self, event_type: str, rows: str) -> str:
        """Return the WITH query that writes an event for each of `rows`, or an empty text.

        The query begins with a comma, for the end of a list of WITH queries. `rows` is a query of
        time, account, id, name, expiry and caller.
        """
        if event_type not in self.wanted:
            return ""
        return f""",
                    announced AS (
                        INSERT INTO webhook_event ({_COLUMNS})
                        SELECT '{event_type}', r.* FROM ({rows}) r)"""  # noqa: S608 - constants only


NO_EVENTS: Final = Outbox(frozenset())
