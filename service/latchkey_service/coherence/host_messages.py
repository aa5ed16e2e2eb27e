"""The lines between the lead of a host and its siblings: JSON objects, one a line.

Both ends are the same release: the supervisor starts them. Owns the conversion of logs.
"""

import json
from typing import Any, Final

from latchkey_coherence.verdict_cache import Position

from latchkey_service.coherence.log import Change, Log, Server

__all__ = ["LINE_BYTES_MAX", "decode", "encode", "log_of", "log_out"]

# A log has at most 10,000 changes and tokens, of some 100 bytes each.
LINE_BYTES_MAX: Final = 4 * 1024 * 1024


def encode(message: dict[str, Any]) -> bytes:
    """Return a message as a line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """Return the message of a line. Raises ValueError."""
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("not an object")  # noqa: TRY004 - a line from outside
    return message


def log_out(log: Log) -> dict[str, Any]:
    """Return a log as JSON."""
    return {
        "known": log.known,
        "server": log.server,
        "head": log.head,
        "changes": [(*change.position, change.token_ids) for change in log.changes],
    }


def log_of(message: dict[str, Any]) -> Log:
    """Return the log of a JSON object. Raises KeyError, TypeError and ValueError."""
    return Log(
        bool(message["known"]),
        Server(*message["server"]),
        Position(*message["head"]),
        tuple(
            Change(Position(revision, mark), tuple(token_ids))
            for revision, mark, token_ids in message["changes"]
        ),
    )
