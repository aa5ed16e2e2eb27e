"""Who did what: each management call as an entry of the audit table.

A change is written together with its entry, in one statement (`store.py`, by `Origin`). Calls that
changed nothing, reads and failures, are noted here and written in batches right after: no caller
waits for that, and what a process that is killed had not written yet is in its log.

Failures are sampled, or whoever is denied could fill the table: of those of one kind in a minute
the first few have entries of their own, and one stands for the rest, so that all are counted.
"""

import asyncio
import contextvars
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple

import grpc

from latchkey_service.audit_table import AuditTable, NewEntry
from latchkey_service.errors import StoreUnavailable
from latchkey_service.log import logger
from latchkey_service.secrets import holds_secret

__all__ = ["AuditLog", "Origin", "call_origin"]

FLUSH_SECONDS: Final = 0.2
# Entries that wait to be written: what a thousand calls a second leave in ten seconds without a
# database. Past that they are only counted.
WAITING_MAX: Final = 10_000
BATCH_MAX: Final = 1_000
SAMPLE_SECONDS: Final = 60.0
SAMPLE_MAX: Final = 10
CLOSE_SECONDS: Final = 1.0
_ACCOUNT_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_TOKEN_ID: Final = re.compile(r"tok_[0-9a-z]{26}")
_PEER_LENGTH_MAX: Final = 200


@dataclass(slots=True)
class Origin:
    """Who makes a call, from where, about what. `recorded`: it is written, with its change."""

    caller: str
    method: str
    peer: str
    request_id: str
    account_id: str
    token_id: str
    recorded: bool = False

    @classmethod
    def of(
        cls,
        caller: str,
        method: str,
        peer: str,
        request_id: str,
        account_id: str,
        token_id: str,
    ) -> "Origin":
        """Return the origin; of what the caller sent, only what has the form that it should."""
        if not _ACCOUNT_ID.fullmatch(account_id) or holds_secret(account_id):
            account_id = ""
        if not _TOKEN_ID.fullmatch(token_id):
            token_id = ""
        return cls(caller, method, peer[:_PEER_LENGTH_MAX], request_id, account_id, token_id)

    def fields(self) -> dict[str, str]:
        """Return what the log tells of it beside the method and the peer."""
        fields = {"caller": self.caller, "account_id": self.account_id, "token_id": self.token_id}
        return {name: value for name, value in fields.items() if value}


# Of the call that runs. Read where a request enters the domain (`rpc.py`), and passed on there.
call_origin: contextvars.ContextVar[Origin] = contextvars.ContextVar("call_origin")


class _Kind(NamedTuple):
    caller: str
    method: str
    code: str
    reason: str


class _Sample:
    """Calls of one kind since `since`: how many, and how many of them have no entry."""

    __slots__ = ("calls", "since", "uncounted")

    def __init__(self, since: float) -> None:
        self.since = since
        self.calls = 0
        self.uncounted = 0


class AuditLog:
    """What is still to be written. Belongs to the event loop."""

    def __init__(
        self,
        table: AuditTable,
        monotonic: Callable[[], float],
        now: Callable[[], datetime],
    ) -> None:
        self._table = table
        self._monotonic = monotonic
        self._now = now
        self._waiting: list[NewEntry] = []
        self._samples: dict[_Kind, _Sample] = {}
        # Of methods that have no entries: only what is logged is sampled.
        self._told: dict[_Kind, _Sample] = {}
        self._failing = False
        self._log = logger()

    def writes(self, caller: str, method: str, code: str, reason: str) -> bool:
        """Tell whether a call that changed nothing is to be noted; else it is counted already."""
        sample = self._samples.get(_Kind(caller, method, code, reason))
        if sample is None or self._has_room(sample, code):
            return True
        sample.calls += 1
        sample.uncounted += 1
        return False

    def note(self, origin: Origin, code: str, reason: str) -> bool:
        """Note a call that changed nothing; tell whether it has an entry of its own."""
        kind = _Kind(origin.caller, origin.method, code, reason)
        sample = self._sample(self._samples, kind)
        has_room = self._has_room(sample, code)
        sample.calls += 1
        if not has_room:
            sample.uncounted += 1
            return False
        self._waiting.append(
            NewEntry(
                self._now(),
                origin.caller,
                origin.method,
                origin.account_id,
                origin.token_id,
                origin.peer,
                origin.request_id,
                _number(code),
                reason,
                1,
            )
        )
        return True

    def tells(self, caller: str, method: str, reason: str) -> bool:
        """Tell whether a denied call of a method without entries is to be logged."""
        kind = _Kind(caller, method, "", reason)
        sample = self._sample(self._told, kind)
        sample.calls += 1
        if sample.calls > SAMPLE_MAX:
            sample.uncounted += 1
            return False
        return True

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            self._close_samples(self._monotonic() - SAMPLE_SECONDS)
            await self._flush()

    async def close(self) -> None:
        """Write what is left, for a bounded time."""
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                # What is counted may have had to wait until there was room.
                self._close_samples(self._monotonic())
                while self._waiting and await self._flush():
                    self._close_samples(self._monotonic())
        except TimeoutError:
            pass
        if self._waiting:
            uncounted = sum(sample.uncounted for sample in self._samples.values())
            self._log.error(
                "audit entries not written", entries=len(self._waiting), calls_without=uncounted
            )

    def _has_room(self, sample: "_Sample", code: str) -> bool:
        """Tell whether one more of these has an entry of its own."""
        full = len(self._waiting) >= WAITING_MAX
        return not full and (code == "OK" or sample.calls < SAMPLE_MAX)

    def _sample(self, samples: dict[_Kind, _Sample], kind: _Kind) -> _Sample:
        sample = samples.get(kind)
        if sample is None:
            sample = samples[kind] = _Sample(self._monotonic())
        return sample

    def _close_samples(self, before: float) -> None:
        """Count what began up to then and has no entry, and begin anew."""
        for kind, sample in [item for item in self._samples.items() if item[1].since <= before]:
            if sample.uncounted and len(self._waiting) >= WAITING_MAX:
                # It goes on to count, and is written when the database is back.
                continue
            del self._samples[kind]
            if sample.uncounted:
                self._waiting.append(
                    NewEntry(
                        self._now(),
                        kind.caller,
                        kind.method,
                        "",
                        "",
                        "",
                        "",
                        _number(kind.code),
                        kind.reason,
                        sample.uncounted,
                    )
                )
                self._tell_rest(kind, sample)
        for kind, sample in [item for item in self._told.items() if item[1].since <= before]:
            del self._told[kind]
            if sample.uncounted:
                self._tell_rest(kind, sample)

    def _tell_rest(self, kind: _Kind, sample: _Sample) -> None:
        self._log.warning(
            "calls not told one by one",
            method=kind.method,
            reason=kind.reason,
            caller=kind.caller,
            calls=sample.uncounted,
        )

    async def _flush(self) -> bool:
        """Write a batch; tell whether that went well. What could not be written stays."""
        batch = self._waiting[:BATCH_MAX]
        if not batch:
            return True
        try:
            await self._table.insert(batch)
        except StoreUnavailable as error:
            # Whether it was committed is not known after a time-out: rather twice than never.
            if not self._failing:
                self._log.warning("audit entries wait", error=type(error).__name__)
            self._failing = True
            return False
        except Exception as error:  # noqa: BLE001 - one batch that cannot be written must not hold up all others
            self._log.error("audit entries lost", entries=len(batch), error=type(error).__name__)
        self._failing = False
        del self._waiting[: len(batch)]
        return True


def _number(code: str) -> int:
    number: int = grpc.StatusCode[code].value[0]
    return number
