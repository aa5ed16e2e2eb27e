"""The shipped classes with one rule removed, to show that the tests detect its absence.

Only the modules that start the processes of this test read LATCHKEY_TEST_BREAK_RULE, and only they
call `break_rule`: no setting of the product calls it.
"""

import os
from collections.abc import Callable
from typing import Any

__all__ = ["RULES", "VARIABLE", "break_rule", "rule_to_break"]

VARIABLE = "LATCHKEY_TEST_BREAK_RULE"


def rule_to_break() -> str | None:
    """Return the rule that the environment names. Raises SystemExit if it is not in RULES."""
    rule = os.environ.get(VARIABLE) or None
    if rule is not None and rule not in RULES:
        raise SystemExit(f"{VARIABLE} is one of {', '.join(RULES)}")
    return rule


def break_rule(rule: str | None) -> None:
    """Remove a rule from the classes of this process, before any of them is used."""
    if rule is not None:
        RULES[rule]()


def _renewal_of_no_row() -> None:
    """Rule 3: the lease is extended although the update changed no row."""
    from latchkey_service.coherence.verifier_table import OwnRow

    renew = OwnRow.renew

    async def always(*args: Any) -> tuple[bool, Any]:
        _, log = await renew(*args)
        return True, log

    _replace(OwnRow, "renew", always)


def _renewal_without_the_log() -> None:
    """Rule 3: the lease is extended without reading the log."""
    from dataclasses import replace

    from latchkey_service.coherence.verifier_table import OwnRow

    read_log, renew = OwnRow.read_log, OwnRow.renew

    async def nothing_new(*args: Any) -> Any:
        return replace(await read_log(*args), changes=())

    async def renewed(*args: Any) -> tuple[bool, Any]:
        done, log = await renew(*args)
        return done, replace(log, changes=())

    _replace(OwnRow, "read_log", nothing_new)
    _replace(OwnRow, "renew", renewed)


def _fill_without_the_rule() -> None:
    """Rule 4: every read is cached, even if an invalidation has followed it."""
    from latchkey_coherence.verdict_cache import VerdictCache

    store = VerdictCache.store

    def always(self: VerdictCache[Any], key: bytes, entry: Any, _position: object) -> bool:
        return store(self, key, entry, self.position)

    _replace(VerdictCache, "store", always)


def _use_without_a_lease() -> None:
    """Rule 5: the server or client never checks a lease once it has been granted."""
    from latchkey import verifier as client
    from latchkey_service.tokens import verifier

    cached = verifier.Verifier.verify_cached

    # Lower than the end of any lease, and higher than the value for "no lease". Only the look into
    # the cache sees it, because deadlines need a clock that runs.
    def with_clock_stopped(self: verifier.Verifier, *args: Any, **options: Any) -> Any:
        clock, self._clock = self._clock, lambda: 0.0
        try:
            return cached(self, *args, **options)
        finally:
            self._clock = clock

    _replace(verifier.Verifier, "verify_cached", with_clock_stopped)
    _replace(client, "boottime", lambda: 0.0)


def _acknowledgement_before_the_clients() -> None:
    """Rule 7: a server process acknowledges the position that it has applied, whatever its clients
    have confirmed."""
    from latchkey_service.coherence.verifier_state import VerifierState

    def own(self: VerifierState[Any], _now: float) -> int:
        return self.cache.position.revision

    _replace(VerifierState, "acknowledgeable", own)


def _delete_without_a_wait() -> None:
    """Rule 8: Delete returns as soon as it is committed."""
    from latchkey_service.coherence.ack_rules import Acknowledgements
    from latchkey_service.coherence.ack_waiter import AckWaiter

    async def at_once(_self: AckWaiter, _position: object, _deadline: float) -> Acknowledgements:
        return Acknowledgements(0, 0)

    _replace(AckWaiter, "wait", at_once)


def _changes_without_a_wait() -> None:
    """Rule 8: every change that narrows a token, except Delete, returns as soon as it is
    committed."""
    from latchkey_service.coherence.ack_rules import NO_ACKNOWLEDGEMENTS, Acknowledgements
    from latchkey_service.tokens.confirmation import Call, Confirmations

    async def at_once(_self: Confirmations, _position: object, _call: Call) -> Acknowledgements:
        return NO_ACKNOWLEDGEMENTS

    _replace(Confirmations, "wait", at_once)


def _burial_of_the_living() -> None:
    """Rule 9: rows are removed even if they were just renewed."""
    from latchkey_service.coherence.ack_rules import DeadVerifierDetector
    from latchkey_service.coherence.verifier_table import OwnRow

    remove_dead = OwnRow.remove_dead

    def everybody(_self: DeadVerifierDetector, rows: Any, _asked: float, _now: float) -> list[Any]:
        return list(rows)

    async def but_myself(self: OwnRow, row: Any) -> bool:
        return row.id != self._identity.id and await remove_dead(self, row)

    _replace(DeadVerifierDetector, "dead", everybody)
    _replace(OwnRow, "remove_dead", but_myself)


def _positions_without_marks() -> None:
    """Rule 12: servers and clients compare positions by revision only.

    The database compares bare revisions as well, and a change of its timeline is ignored.
    """
    from latchkey_coherence.verdict_cache import Position, VerdictCache
    from latchkey_service.coherence import verifier_table
    from latchkey_service.coherence.reads import ReadBegan, Standing
    from latchkey_service.coherence.snapshot import POSITION_KNOWN, Snapshot
    from latchkey_service.coherence.verifier_state import Server

    def knows(self: VerdictCache[Any], position: Position) -> bool:
        return position.revision <= self.position.revision

    def always(_self: VerdictCache[Any], _position: Position) -> bool:
        return True

    def standing(self: ReadBegan, snapshot: Snapshot, _state: object) -> Standing:
        is_old = snapshot.position.revision < self.applied
        return Standing.REFUSED if is_old else Standing.BELIEVED

    def unknown(_identifier: object, _timeline: object) -> Server:
        return Server(None, None)

    _replace(VerdictCache, "knows", knows)
    _replace(VerdictCache, "agrees", always)
    _replace(ReadBegan, "standing", standing)
    _replace(verifier_table, "Server", unknown)
    for name in ("_RENEW", "_READ_LOG"):
        sql = getattr(verifier_table, name)
        assert POSITION_KNOWN in sql
        # As in the shipped code, a head that is behind means another history.
        by_number = "(h.revision >= $1 AND $2::bigint IS NOT NULL)"
        _replace(verifier_table, name, sql.replace(POSITION_KNOWN, by_number))


def _look_ups_of_any_position() -> None:
    """Rule 12: the result of every look-up is accepted, whatever server it was read from."""
    from latchkey_service.coherence.reads import ReadBegan, Standing

    def always(_self: ReadBegan, _snapshot: object, _state: object) -> Standing:
        return Standing.BELIEVED

    _replace(ReadBegan, "standing", always)


def _replace(owner: Any, name: str, by: Any) -> None:
    """Replace an existing attribute. Without this check, after a renaming the rule would
    silently stay in place.
    """
    if name not in vars(owner):
        raise AttributeError(f"{owner} has no {name} any more")
    setattr(owner, name, by)


RULES: dict[str, Callable[[], None]] = {
    "3": _renewal_of_no_row,
    "3-log": _renewal_without_the_log,
    "4": _fill_without_the_rule,
    "5": _use_without_a_lease,
    "7": _acknowledgement_before_the_clients,
    "8": _delete_without_a_wait,
    "8-changes": _changes_without_a_wait,
    "9": _burial_of_the_living,
    "12": _positions_without_marks,
    "12-look-up": _look_ups_of_any_position,
}
