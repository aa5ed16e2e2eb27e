"""The lines between the lead of a host and its siblings: JSON objects, one a line.

Both ends are the same release: the supervisor starts them. Owns the conversion of logs.

A line without a question is news: "log" if the log has new entries, and includes them if they are
few; "lease" if the lead's lease has changed, or its doubt about Postgres; "closing" if it will
stop.
"""

import json
from typing import Any, Final

from latchkey_coherence.verdict_cache import Position

from latchkey_service.coherence.host_lead import UnaskedLog
from latchkey_service.coherence.log import Change, Log, Server

__all__ = [
    "LINE_BYTES_MAX",
    "decode",
    "encode",
    "log_of",
    "log_out",
    "news_of_log",
    "unasked_log_of",
]

# A log has at most 10,000 changes and tokens, of about 100 bytes each.
LINE_BYTES_MAX: Final = 4 * 1024 * 1024
_ENCODER: Final = json.JSONEncoder(separators=(",", ":"))


def encode(message: dict[str, Any]) -> bytes:
    """Return a message as a line."""
    return _ENCODER.encode(message).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """Return the message of a line. Raises ValueError."""
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("not an object")  # noqa: TRY004 - a line from outside
    return message


def log_out(log: Log) -> dict[str, Any]:
    """Convert a log to JSON."""
    return {
        "known": log.known,
        "server": log.server,
        "head": log.head,
        "changes": [(*change.position, change.token_ids) for change in log.changes],
        "read_began": log.read_began,
    }


def log_of(message: dict[str, Any]) -> Log:
    """Convert JSON to a log. Raises KeyError, TypeError and ValueError."""
    return Log(
        bool(message["known"]),
        Server(*message["server"]),
        Position(*message["head"]),
        tuple(
            Change(Position(revision, mark), tuple(token_ids))
            for revision, mark, token_ids in message["changes"]
        ),
        read_began=float(message["read_began"]),
    )


def news_of_log(unasked: UnaskedLog | None) -> dict[str, Any]:
    """Return the news that the log has new entries, including them if there is a log to send."""
    if unasked is None:
        return {"news": "log"}
    return {"news": "log", "after": unasked.after, "log": log_out(unasked.log)}


def unasked_log_of(news: dict[str, Any]) -> UnaskedLog | None:
    """Return the log that such news contains, if any. Raises KeyError, TypeError and ValueError."""
    if "log" not in news:
        return None
    return UnaskedLog(Position(*news["after"]), log_of(news["log"]))
