"""JSON for scripts, with the proto's field names. Every key is always present.

The values follow protobuf's JSON format. Times are RFC 3339 in UTC, or null. Durations are seconds
followed by "s". Enums use the proto's names: SCOPE_READ, VERDICT_VALID. Marks are 64-bit numbers
and therefore strings of digits: many JSON readers would round a number of that size.
"""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # Types only: shell completion must not wait for gRPC to load.
    from latchkey import CreatedToken, Receipt, Status, Token, Verification

__all__ = ["created", "receipt", "status", "token", "verification"]


def created(answer: "CreatedToken") -> dict[str, Any]:
    """Return a new token with its secret."""
    return {"token": token(answer.token), "secret": answer.secret.reveal()}


def token(token: "Token") -> dict[str, Any]:
    """Return a token."""
    return {
        "id": token.id,
        "account_id": token.account_id,
        "name": token.name,
        "scope": f"SCOPE_{token.scope.name}",
        "create_time": _time(token.create_time),
        "expire_time": _time(token.expire_time),
        "last_used_time": _time(token.last_used_time),
        "last_used_by": token.last_used_by,
        "hint": token.hint,
        "labels": dict(sorted(token.labels.items())),
    }


def receipt(receipt: "Receipt") -> dict[str, Any]:
    """Return a receipt. A null effective_time means that the deletion is not confirmed yet."""
    return {
        "commit_time": _time(receipt.commit_time),
        "effective_time": _time(receipt.effective_time),
        "revision": receipt.revision,
        "verifiers_acknowledged": receipt.verifiers_acknowledged,
        "verifiers_outwaited": receipt.verifiers_outwaited,
        "mark": str(receipt.mark),
        "clients_acknowledged": receipt.clients_acknowledged,
        "clients_outwaited": receipt.clients_outwaited,
    }


def verification(answer: "Verification") -> dict[str, Any]:
    """Return the answer to a verify."""
    return {
        "verdict": f"VERDICT_{answer.verdict.name}",
        "token": None if answer.token is None else token(answer.token),
        "revision": answer.revision,
        "mark": str(answer.mark),
    }


def status(status: "Status") -> dict[str, Any]:
    """Return the state of the service."""
    return {
        "head_revision": status.head_revision,
        "head_mark": str(status.head_mark),
        "verifiers": [
            {
                "id": verifier.id,
                "host": verifier.host,
                "process_id": verifier.process_id,
                "version": verifier.version,
                "start_time": _time(verifier.start_time),
                "acknowledged_revision": verifier.acknowledged_revision,
                "lag": verifier.lag,
                "lease_duration": _duration(verifier.lease_duration),
                "lease_remaining": _duration(verifier.lease_remaining),
                "clients": verifier.clients,
                "notifications": f"NOTIFICATIONS_{verifier.notifications.name}",
                "answering": verifier.answering,
                "waiting_for": list(verifier.waiting_for),
                "pepper_ids": list(verifier.pepper_ids),
                "database_host": verifier.database_host,
                "system_identifier": verifier.system_identifier,
                "timeline": verifier.timeline,
            }
            for verifier in status.verifiers
        ],
        "warnings": list(status.warnings),
    }


def _duration(duration: timedelta) -> str:
    return f"{duration.total_seconds():.6f}s"


def _time(moment: datetime | None) -> str | None:
    if moment is None:
        return None
    # Always with microseconds: all times have the same length, so they sort as text.
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
