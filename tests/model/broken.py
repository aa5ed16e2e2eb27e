"""The models with all rules, and the same models with one rule broken at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.model import rates, rule_12, server, server_state, watch, watch_state
from tests.model.cases import Broken, Healthy, Kept
from tests.model.explore import Model

__all__ = ["BROKEN", "HARMLESS", "KEPT", "LONG"]


KEPT = (
    Kept(
        "server",
        server.model(),
        125_000,
        {
            "Delete has answered; the process, cut off, still holds VALID, its lease run out": (
                lambda s: (
                    s.delete == server_state.ANSWERED
                    and s.cache == server_state.VALID
                    and not s.lease
                )
            ),
            "the same, with its row removed": (
                lambda s: (
                    s.delete == server_state.ANSWERED
                    and s.cache == server_state.VALID
                    and s.row == server_state.NO_ROW
                )
            ),
            "Delete answered while the process was registering with an older head": (
                lambda s: (
                    s.delete == server_state.ANSWERED
                    and s.phase == server_state.UP
                    and s.applied < s.deleted
                )
            ),
            "a VALID read before the deletion is still in transit after Delete has answered": (
                lambda s: (
                    s.delete == server_state.ANSWERED
                    and s.lookup is not None
                    and s.lookup.found == server_state.VALID
                    and s.applied >= s.deleted
                )
            ),
            "that token's deletion has been trimmed from the cache's history": (
                lambda s: s.history >= s.deleted > 0 and s.lookup is not None and s.lease
            ),
            "DELETED is cached": lambda s: s.cache == server_state.DELETED and s.lease,
        },
    ),
    Kept(
        "server, one change",
        server.model(other_changes=0),
        14_000,
        untaken=frozenset({"changes_another"}),
        healthy=Healthy(14_000, lambda s: s.deleted > 0, server.HEALTHY),
    ),
    Kept(
        "one server",
        watch.one_server(),
        12_000,
        {
            "Delete has answered; the client, cut off, still holds VALID, its lease run out": (
                lambda s: s.delete == watch_state.ANSWERED and s.client.cache
            ),
            "a server is dead, and a client's sub-lease of it has not expired": (
                lambda s: (
                    s.servers[0].phase == watch_state.DOWN and s.client.lease and s.client.cache
                )
            ),
            "Delete has answered, and a grant and a VALID from before are still on their way": (
                lambda s: (
                    s.delete == watch_state.ANSWERED
                    and s.client.lookup is not None
                    and s.client.lookup.valid
                    and any(message > 0 for message in s.client.inbox)
                )
            ),
        },
        healthy=Healthy(
            10_000,
            # Except while the server is down and its row remains, or while a dead client's
            # sub-lease runs.
            lambda s: (
                s.delete != watch_state.BEFORE
                and (s.delete == watch_state.ANSWERED or s.servers[0].phase >= watch_state.EMPTY)
                and not (s.client.applied == watch_state.FRESH and s.servers[0].sub_lease)
            ),
            watch.HEALTHY,
        ),
    ),
    *rule_12.KEPT,
    *rates.KEPT,
)

# Too slow for every test run: `make test-slow` and `python -m tests.model` explore these as well.
LONG = (
    Kept("one server, clocks drifting", watch.one_server(clocks=watch_state.DRIFTING), 80_000),
    Kept("one server, two requests at a time", watch.one_server(requests_max=2), 90_000),
    Kept(
        "two servers",
        watch.two_servers(),
        160_000,
        {
            "the client has applied the deletion, and the other server still answers VALID": (
                lambda s: (
                    s.client.applied == 1
                    and s.client.lookup is not None
                    and s.client.lookup.valid
                    and any(one.applied == 0 and one.lease for one in s.servers)
                )
            ),
            "both servers have recorded a sub-lease of the client": (
                lambda s: all(one.sub_lease for one in s.servers)
            ),
        },
    ),
    Kept(
        "succession",
        watch.succession(),
        85_000,
        {
            "the client has moved to the successor, and the dead server's row still exists": (
                lambda s: (
                    s.client.stream == 1
                    and s.client.lease
                    and s.servers[0].phase == watch_state.DOWN
                    and s.servers[0].row == 0
                )
            ),
            "a client of a server that has removed its own row still holds VALID": (
                lambda s: (
                    s.client.cache
                    and s.servers[0].phase == watch_state.DOWN
                    and s.servers[0].row == watch_state.NO_ROW
                    and s.delete == watch_state.ANSWERED
                )
            ),
        },
    ),
    *rule_12.LONG,
)


# What most violations do not need, so that the explorer finds them several times sooner without it.
# The models of broken rules have of these only what their violations need.
SERVER_INCIDENTS = frozenset(
    {
        "answers_by_waiting",
        "dies",
        "finds_lease_live",
        "joins_lookup",
        "prunes_log",
        "time_passes",
        "tries_delete_again",
        "trims_history",
        "watches_row",
    }
)
INCIDENTS = frozenset(
    {
        "answers_by_waiting",
        "asks",
        "begins_to_register",
        "dies",
        "joins_lookup",
        "loses_lookup",
        "registers",
        "removes_row",
        "restarts",
        "stream_breaks",
    }
)


def _server(name: str, steps: int, *needed: str, other_changes: int = 0) -> Broken:
    model = server.model(name, other_changes=other_changes)
    return Broken(name, model.without(SERVER_INCIDENTS.difference(needed)), steps)


def _one_server(name: str, steps: int, *needed: str, requests_max: int = 1) -> Broken:
    model = watch.one_server(name, requests_max=requests_max)
    return Broken(name, model.without(INCIDENTS.difference(needed)), steps)


def _drifting(name: str, steps: int, *needed: str, **clocks: Any) -> Broken:
    # Without its margin, a countdown lasts exactly its nominal time on an accurate clock.
    model = watch.one_server(clocks=replace(watch_state.DRIFTING, **clocks))
    return Broken(name, model.without(INCIDENTS.difference(needed)), steps)


def _several(name: str, steps: int, model: Model, *needed: str) -> Broken:
    return Broken(name, model.without(INCIDENTS.difference(needed)), steps)


BROKEN = (
    # A sequence assigns numbers in the order of requests: a reader's head passes revisions that
    # have not committed yet.
    _server("1 revision from a sequence", 14, "joins_lookup", other_changes=1),
    _server("2 reads before it registers", 13, "finds_lease_live"),
    _server("3 registration gives a lease", 18, "joins_lookup", "time_passes", "watches_row"),
    # An empty cache in its server does not protect a client that arrives with a full one.
    _one_server(
        "3 registration gives a lease", 17, "begins_to_register", "dies", "registers", "removes_row"
    ),
    _server("3 clock read after the log", 17, "answers_by_waiting", "joins_lookup", "time_passes"),
    _server("3 head read after the entries", 18, "finds_lease_live"),
    _server("3 acknowledges head unread", 15, "joins_lookup"),
    _server("3 a renewal without a row succeeds", 16, "joins_lookup", "time_passes", "watches_row"),
    _server(
        "3 cache kept after the loss of the row",
        25,
        "finds_lease_live",
        "time_passes",
        "watches_row",
    ),
    _one_server(
        "3 clients not reset after the loss of the row",
        19,
        "answers_by_waiting",
        "asks",
        "removes_row",
    ),
    _drifting("3 no (1−ρ) in the server's lease", 9, "answers_by_waiting", lease=12),
    _server("4 no fill rule", 15, "joins_lookup"),
    _server("4 revision read after the row", 16, "joins_lookup"),
    _server("4 trimmed entries count as unnamed", 16, "joins_lookup", "trims_history"),
    _server("4 shared without a check", 15, "joins_lookup"),
    _server("4 UNKNOWN is cached", 10),
    _server("4 UNKNOWN is shared", 9, "joins_lookup"),
    _one_server("4 client has no fill rule", 12),
    # A server that answers slowly has applied more changes by the time it sends the answer.
    _one_server("4 verdict carries the revision at its sending", 12),
    _one_server("4 client shares without a check", 12, "joins_lookup"),
    # The client has applied the deletion before it calls a server that has not. That server may
    # answer VALID, late. A verify that begins after Delete's answer finds a look-up that was sent
    # after the last invalidation, and must not share it: the look-up's revision counts, not the
    # time of sending.
    _several(
        "4 client shares by the time of sending",
        13,
        watch.two_servers("4 client shares by the time of sending").without({"time_passes"}),
        "joins_lookup",
    ),
    _server(
        "5 cache used without a lease", 15, "answers_by_waiting", "finds_lease_live", "time_passes"
    ),
    _server(
        "5 clock read before the call", 15, "answers_by_waiting", "finds_lease_live", "time_passes"
    ),
    _server("5 cache read before the clock", 18, "answers_by_waiting", "time_passes"),
    _one_server("5 client answers without a lease", 12),
    _one_server("5 client shares without a lease", 12, "joins_lookup"),
    _one_server("6 grant outlasts the server's lease", 13, "answers_by_waiting"),
    _one_server("6 grant counted from its receipt", 13),
    _one_server("6 grant counted from the latest request", 14, "asks", requests_max=2),
    _one_server("6 grant overtakes an invalidation", 16, "asks"),
    _one_server("6 nothing sent to a client that returns", 16, "stream_breaks"),
    _drifting("6 no (1−ρ) in the client's lease", 14, counted_percent=100),
    _drifting("6 no (1+2ρ) in the server's record", 13, recorded_percent=100),
    _one_server("7 acknowledges before its clients", 12),
    _one_server("7 client acknowledges what it has not applied", 15, "asks"),
    _one_server("7 grant not recorded", 12),
    _one_server("7 a broken stream ends the record", 13, "stream_breaks"),
    _one_server("7 record shortened by the next grant", 15, "asks"),
    _server("8 no wait", 12, "joins_lookup"),
    _server("8 wait shorter than T", 13, "answers_by_waiting", "joins_lookup", "time_passes"),
    _server(
        "8 wait counted from before the commit",
        15,
        "answers_by_waiting",
        "joins_lookup",
        "time_passes",
    ),
    _server("8 a retry answers at once", 12, "joins_lookup", "tries_delete_again"),
    _drifting("8 no (1+ρ) in the wait", 8, "answers_by_waiting", wait=12),
    _server("9 row not watched for T", 14, "joins_lookup", "watches_row"),
    _server("9 `renewal` not compared", 16, "joins_lookup", "time_passes", "watches_row"),
    _one_server("9 a restart takes over the row", 14, "begins_to_register", "dies", "registers"),
    _several(
        "9 own row removed before the clients' leases end",
        11,
        watch.succession("9 own row removed before the clients' leases end"),
    ),
    _drifting("9 no (1+ρ) in watching a row", 9, "removes_row", ticks=2),
    _server(
        "10 a notification extends the lease",
        13,
        "answers_by_waiting",
        "joins_lookup",
        "time_passes",
    ),
    _server(
        "10 log read only after a notification",
        17,
        "answers_by_waiting",
        "joins_lookup",
        "time_passes",
    ),
    _server(
        "11 pruning not detected",
        26,
        "finds_lease_live",
        "prunes_log",
        "time_passes",
        "watches_row",
    ),
    *rule_12.BROKEN,
    *rates.BROKEN,
)


def _harmless(name: str) -> Broken:
    return Broken(name, server.model(name, other_changes=0), 0)


# Breaking these rules causes no violation, because another rule gives the same protection.
HARMLESS = (
    # The other half of rule 11, detecting that entries are missing, is enough. (Keeping the log
    # longer only avoids emptying caches needlessly.)
    _harmless("11 unacknowledged entries pruned"),
    # Within one process that reads tokens where it reads the log, a look-up sent after the deletion
    # was applied cannot find VALID. Within a client it can.
    _harmless("4 shared by the time of sending"),
)
