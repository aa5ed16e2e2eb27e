"""Recognises requests that may take rights away, before they wait for a slot.

Whether a change narrows a token depends on the token, which only the database knows. So a request
counts if it could: being wrong costs other calls a place in the queue, and the caller its rate for
removals.
"""

from typing import Any, Final

from latchkey_service.access.methods import ROTATE

__all__ = ["may_narrow"]

# Fields of an Update on which a verdict depends.
_DECIDING: Final = frozenset(("scope", "expire_time", "allowed_networks", "permissions"))


def may_narrow(path: str, request: Any) -> bool:
    """Return whether a request of Update or Rotate can make a secret invalid when it returns."""
    if path == ROTATE:
        # Without either, the older secrets end now (the contract).
        grace = request.grace
        return not (grace.seconds or grace.nanos or request.retire_on_first_use)
    return not _DECIDING.isdisjoint(request.update_mask.paths)
