"""Positions, histories and timelines: the models of rule 12, and the same models with one rule
broken.
"""

from __future__ import annotations

from typing import Any

from tests.model import histories, management, moves, moves_state
from tests.model.cases import Broken, Healthy, Kept
from tests.model.histories_state import ANSWERED, BEFORE, NEW, OLD, PROMOTED

__all__ = ["BROKEN", "KEPT", "LONG"]

# A reaches the new primary. B still reads the old one.
APART: dict[str, Any] = {
    "first": moves_state.SCATTERED,
    "ticks": 2,
    "renew": (0,),
    "old": (1,),
    "streams_max": 2,
}
OVERTAKEN = APART | {"first": moves_state.OVERTAKEN}
RETURNING: dict[str, Any] = {"first": moves_state.RETURNING, "ticks": 2, "others": "n"}

KEPT = (
    Kept(
        "histories",
        histories.model(others=("o",)),
        50_000,
        {
            "both histories give one revision to different changes, and the process holds one": (
                lambda s: s.lease and s.applied == "o" and s.databases[NEW].log == "N"
            ),
            "each history has a deletion, with a different mark": (
                lambda s: "O" in s.databases[OLD].log and "N" in s.databases[NEW].log
            ),
            "a repeated change has found itself on a deposed primary, and nowhere else": (
                lambda s: s.found and s.standby == PROMOTED and not s.databases[NEW].log
            ),
            "Delete has answered; a look-up that stayed behind brings VALID at the same revision": (
                lambda s: (
                    s.delete == ANSWERED
                    and s.applied == "N"
                    and s.lookup is not None
                    and s.lookup.read == "o"
                )
            ),
            "connected only to a deposed primary, it still answers from the cache": (
                lambda s: (
                    s.standby == PROMOTED and s.cache and s.lease and "N" in s.databases[NEW].log
                )
            ),
        },
        healthy=Healthy(
            30_000,
            lambda s: s.standby == PROMOTED and s.delete != BEFORE,
            histories.HEALTHY,
        ),
    ),
    Kept(
        "histories, from a backup",
        histories.model(backup=True, others=("o",)),
        45_000,
        {
            "a deletion was lost, and the process has applied it": (
                lambda s: (
                    s.standby == PROMOTED and s.applied == "O" and s.databases[NEW].log in {"", "N"}
                )
            ),
        },
        # A deletion that the backup lacks is never confirmed.
        frozenset({"settles"}),
    ),
    Kept(
        "management",
        management.model(),
        24_000,
        {
            "a deposed primary has answered that there is no such token, and it was created": (
                lambda s: s.call.owed and s.call.at == OLD and s.call.log == s.applied and s.lease
            ),
            "a ghost is cached under the old primary's lease": (
                lambda s: s.cache and s.has_token == (True, False) and s.lease
            ),
        },
    ),
    Kept(
        "moves, one server",
        moves.model(servers=1),
        85_000,
        {
            "the client holds VALID of a history that its server has lost": (
                lambda s: (
                    s.client.cache
                    and s.client.lease
                    and s.client.applied == "o"
                    and s.log == "N"
                    and any(server.applied == "N" for server in s.servers)
                )
            ),
            "a confirmation and a Reset cross": (
                lambda s: any(
                    server.stream
                    and any(said.applied == "o" for said in server.stream.out)
                    and any(message.kind == moves_state.RESET for message in server.stream.inbox)
                    for server in s.servers
                )
            ),
        },
        frozenset({"changes_another"}),
    ),
    Kept(
        "moves, apart",
        moves.model(**APART),
        57_000,
        {
            "the client has moved to the other history, and holds VALID under its lease": (
                lambda s: s.client.applied == "o" and s.client.cache and s.client.lease
            ),
            "the client has returned, and both servers have recorded its grants": (
                lambda s: s.client.applied == "N" and all(one.sub_lease for one in s.servers)
            ),
        },
        frozenset({"changes_another", "deletes", "reads_log"}),
    ),
    Kept(
        "moves, returning",
        moves.model(**RETURNING),
        29_000,
        # VALID cannot return once the client follows the other history.
        untaken=frozenset({"answers_from_memory", "deletes", "verifies_at_once"}),
    ),
    Kept(
        "moves, debts",
        moves.model(servers=1, bounded=True, old=(), ticks=2),
        57_000,
        untaken=frozenset({"changes_another"}),
    ),
)

LONG = (
    Kept("histories, two changes", histories.model(), 170_000),
    Kept("histories, T of two ticks", histories.model(ticks=2), 460_000),
    Kept(
        "histories, from a backup, two changes",
        histories.model(backup=True),
        170_000,
        untaken=frozenset({"settles"}),
    ),
    Kept(
        "moves, overtaken",
        moves.model(**OVERTAKEN),
        96_000,
        untaken=frozenset({"changes_another", "deletes", "reads_log"}),
    ),
    Kept(
        "moves, one left behind",
        moves.model(renew=(0,), old=(1,)),
        95_000,
        untaken=frozenset({"changes_another"}),
    ),
    Kept(
        "moves, debts, two histories",
        moves.model(servers=1, bounded=True),
        137_000,
        untaken=frozenset({"changes_another"}),
    ),
    Kept("moves, two changes", moves.model(servers=1, others="n"), 300_000),
)


# What most violations do not need, so that the explorer finds them several times sooner without it.
# The models of broken rules have of these only what their violations need.
INCIDENTS = frozenset(
    {
        "answers_by_waiting",
        "changes_another",
        "dies",
        "joins_lookup",
        "loses_lookup",
        "reads_log",
        "removes_row",
        "standby_catches_up",
        "standby_is_cut_off",
        "stream_breaks",
        "time_passes",
    }
)
OTHER = {"others": ("o",)}


def _histories(name: str, steps: int, *needed: str, **configuration: Any) -> Broken:
    model = histories.model(name, **OTHER | configuration)
    return Broken(name, model.without(INCIDENTS.difference(needed)), steps)


def _management(name: str, steps: int) -> Broken:
    return Broken(name, management.model(name), steps)


def _moves(name: str, steps: int, configuration: dict[str, Any], *needed: str) -> Broken:
    model = moves.model(name, **configuration)
    return Broken(name, model.without(INCIDENTS.difference(needed)), steps)


ONE: dict[str, Any] = {"servers": 1}

BROKEN = (
    _histories("3 renewal committed asynchronously", 9, "answers_by_waiting", "time_passes"),
    _histories("3 log and row in two statements", 11, "answers_by_waiting", "time_passes"),
    _histories("4 a call's own answer not checked", 8),
    _histories("5 reads without a lease", 8, "answers_by_waiting", "time_passes"),
    _histories("8 a retry trusts a deletion that is not durable", 9),
    _histories("8 a repeated change is confirmed from what it reads", 9, others=()),
    _histories("8 a repeated change is confirmed on any history", 10, others=()),
    _histories("12 bare numbers", 9, "changes_another"),
    _histories("12 acknowledged without a condition", 11, "changes_another", "reads_log"),
    _histories("12 a look-up of any later revision is accepted", 9, "changes_another"),
    _histories("12 a verdict of an unknown position is cached", 10, "changes_another"),
    _histories(
        "12 lease kept after the loss of the history", 11, "answers_by_waiting", "time_passes"
    ),
    _histories(
        "12 rows read on a history without the deletion", 10, "changes_another", "reads_log"
    ),
    _histories(
        "12 backup restored before the old leases ended", 9, "standby_is_cut_off", backup=True
    ),
    _management("12 NOT_FOUND without a lease", 7),
    _management("12 NOT_FOUND without a position", 7),
    _management("12 a read of another timeline is accepted", 7),
    _management("12 a log read adopts a timeline and keeps the lease", 8),
    _management("12 a read of a standby is accepted", 6),
    _management("12 cache kept on another timeline", 9),
    # The log behind the lease contains changes that the server has applied but not sent.
    _moves("6 granted while applied changes are unsent", 14, ONE),
    _moves("7 granted while a confirmation is due", 7, ONE | {"bounded": True}, "time_passes"),
    _moves(
        "12 a client's revision is accepted without its mark", 17, ONE, "reads_log", "stream_breaks"
    ),
    _moves("12 confirmations of a lost history count", 16, ONE, "reads_log"),
    _moves("12 registration acknowledges head while a grant runs", 15, ONE, "reads_log"),
    _moves(
        "12 clients of a lost history are not reset", 14, RETURNING, "changes_another", "reads_log"
    ),
    _moves("12 events sent before the client's first message", 12, RETURNING, "changes_another"),
    _moves("12 a Reset does not end the lease", 8, APART, "answers_by_waiting", "time_passes"),
    _moves(
        "12 a grant requested before a Reset counts", 12, APART, "answers_by_waiting", "time_passes"
    ),
    _moves(
        "12 a client caches a verdict of an unknown position",
        4,
        APART,
        "answers_by_waiting",
        "time_passes",
    ),
    _moves(
        "12 a client caches a verdict of any later revision",
        4,
        APART,
        "answers_by_waiting",
        "time_passes",
    ),
    # The invalidation lists the changes since a position that is no longer the client's.
    _moves("12 other streams continue", 13, OVERTAKEN, "answers_by_waiting", "time_passes"),
)
