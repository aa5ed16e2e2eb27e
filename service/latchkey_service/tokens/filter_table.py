"""The SQL of filters and orders: which live tokens match, and how List walks through them.

A walk reads an account's tokens from one index, in the order of the list, up to a limit. The
filter's conditions apply to what it reads. So the limit bounds the cost of a statement, however
many tokens the account has and however few of them match.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from latchkey_service.tokens.filters import Filter, Order, State

__all__ = ["Arguments", "Start", "best_order", "condition_of", "order_of", "walk"]


@dataclass(frozen=True, slots=True)
class Start:
    """A position in a list: after the token with this key of the order and this id."""

    key: datetime
    id: str


class Arguments:
    """The arguments of a statement, in the order of their numbers.

    `hidden`: the planner does not see their values. A walk has one plan for all of them, but in a
    large table the planner expects so much of a plan for the values of an account with many tokens
    that it makes one for each call. That takes as long as a page.
    """

    def __init__(self, *values: object, hidden: bool = False) -> None:
        self._hidden = hidden
        self.values = list(values)
        self._kinds: list[str | None] = [None] * len(values)

    def add(self, value: object, kind: str) -> str:
        """Add an argument of this type and return the SQL that stands for it.

        Does not add the same object twice.
        """
        known = zip(self.values, self._kinds, strict=True)
        for number, (other, other_kind) in enumerate(known, start=1):
            if other is value and other_kind == kind:
                return self.sql(number, kind)
        self.values.append(value)
        self._kinds.append(kind)
        return self.sql(len(self.values), kind)

    def sql(self, number: int, kind: str) -> str:
        """Return the SQL that stands for the argument with this number."""
        argument = f"${number}::{kind}"
        # The outer cast, because `= ANY ((SELECT ...))` would compare with rows.
        return f"(SELECT {argument})::{kind}" if self._hidden else argument


_EXPIRY = "coalesce(t.expire_time, 'infinity'::timestamptz)"
# The columns that each order sorts by, as its index has them.
_KEYS = {
    Order.NEWEST: ("t.create_time", "t.id"),
    Order.EXPIRY: (_EXPIRY, "t.id"),
    Order.LAST_USE: ("u.last_used_time", "u.token_id"),
}
# Without the prefix of a key whose name another token has taken over.
_NAME = r"regexp_replace(t.name_key, '^\x01[^\x01]*\x01', '')"
# Subqueries that return one value: the planner computes them for each token that is read. It may
# turn an EXISTS into a hash of the whole table.
_LAST_USE = "(SELECT max(u.last_time) FROM token_usage u WHERE u.token_id = t.id)"
# A token's first secret is as old as the token, and has the ordinal 0. The others have an index.
_RENEWED = """coalesce((SELECT max(x.create_time) FROM secret x
                   WHERE x.token_id = t.id AND x.ordinal > 0), t.create_time)"""
# Among the secrets that owners see: those that work, and the newest one.
_LEAKED = """coalesce((SELECT bool_or(s.leak_report_time IS NOT NULL)
                   FROM (SELECT x.leak_report_time, x.ordinal, max(x.ordinal) OVER () AS newest,
                                least(x.expire_time, x.retire_time) AS end_time
                           FROM secret x
                          WHERE x.token_id = t.id) s
                  WHERE s.ordinal = s.newest OR coalesce(s.end_time > {now}, true)), false)"""
# Characters of a secret at the end of its hint.
_HINT_LENGTH = 4
_HINTS = f"""(position({{text}} IN lower(right(t.hint, {_HINT_LENGTH}) COLLATE "C")) > 0
         OR (SELECT bool_or(position({{text}} IN lower(right(x.hint, {_HINT_LENGTH})
                                                       COLLATE "C")) > 0)
               FROM secret x
              WHERE x.token_id = t.id AND x.retire_time IS NULL
                AND coalesce(x.expire_time > {{now}}, true)))"""  # noqa: S608 - constants only


def condition_of(selected: Filter, now: datetime, arguments: Arguments) -> str:
    """Return the SQL condition on `t`, and add its arguments. `selected` is folded."""
    parts = [
        *_about_owners_choices(selected, now, arguments),
        *_about_times(selected, arguments),
        *_about_state(selected, now, arguments),
        *_about_leaks(selected, now, arguments),
    ]
    return " AND ".join(parts) or "true"


def _about_owners_choices(selected: Filter, now: datetime, arguments: Arguments) -> Iterator[str]:
    if selected.ids:
        yield f"t.id = ANY({arguments.add(selected.ids, 'text[]')})"
    if selected.scope:
        yield f"t.scope = {arguments.add(selected.scope, 'smallint')}"
    if selected.name_contains:
        yield f"position({arguments.add(selected.name_contains, 'text')} IN {_NAME}) > 0"
    if selected.search:
        yield _search(selected.search, now, arguments)
    if selected.labels:
        yield f"t.labels @> {arguments.add(json.dumps(dict(selected.labels)), 'jsonb')}"


def _search(text: str, now: datetime, arguments: Arguments) -> str:
    in_name = f"position({arguments.add(text, 'text')} IN {_NAME}) > 0"
    # The end of a hint. Its ellipsis becomes three periods when the text is folded.
    end = text.rpartition("...")[2]
    if not 1 <= len(end) <= _HINT_LENGTH:
        return in_name
    in_hint = _HINTS.format(text=arguments.add(end, "text"), now=arguments.add(now, "timestamptz"))
    return f"({in_name} OR {in_hint})"


def _about_times(selected: Filter, arguments: Arguments) -> Iterator[str]:
    if selected.expires_before is not None:
        yield f"t.expire_time < {arguments.add(selected.expires_before, 'timestamptz')}"
    if selected.never_expires is not None:
        yield f"t.expire_time IS {'' if selected.never_expires else 'NOT '}NULL"
    # The last use is NULL without one. Each condition computes it once.
    if selected.unused_since is not None:
        since = arguments.add(selected.unused_since, "timestamptz")
        yield f"t.create_time < {since}"
        if selected.never_used is None:
            yield f"coalesce({_LAST_USE} < {since}, true)"
        elif not selected.never_used:
            yield f"coalesce({_LAST_USE} < {since}, false)"
    if selected.never_used:
        yield f"{_LAST_USE} IS NULL"
    elif selected.never_used is not None and selected.unused_since is None:
        yield f"{_LAST_USE} IS NOT NULL"
    if selected.secret_created_before is not None:
        before = arguments.add(selected.secret_created_before, "timestamptz")
        yield f"t.create_time < {before} AND {_RENEWED} < {before}"


def _about_state(selected: Filter, now: datetime, arguments: Arguments) -> Iterator[str]:
    # Only in conditions that need the time: Postgres refuses an argument that is not used.
    def expired() -> str:
        return f"coalesce(t.expire_time <= {arguments.add(now, 'timestamptz')}, false)"

    def active() -> str:
        return f"t.disable_time IS NULL AND NOT {expired()}"

    match selected.state:
        case State.ACTIVE:
            yield active()
        case State.DISABLED:
            yield "t.disable_time IS NOT NULL"
        case State.EXPIRED:
            yield f"t.disable_time IS NULL AND {expired()}"
    if selected.can_write is not None:
        yield f"{'' if selected.can_write else 'NOT '}(t.scope = 2 AND {active()})"


def _about_leaks(selected: Filter, now: datetime, arguments: Arguments) -> Iterator[str]:
    if selected.leaked is not None:
        leaked = _LEAKED.format(now=arguments.add(now, "timestamptz"))
        yield leaked if selected.leaked else f"NOT {leaked}"


def best_order(selected: Filter) -> Order:
    """Return the order whose walk skips the most tokens that do not match."""
    if selected.unused_since is not None or selected.never_used is not None:
        return Order.LAST_USE
    if (
        selected.expires_before is not None
        or selected.never_expires is not None
        or selected.state == State.EXPIRED
    ):
        return Order.EXPIRY
    return Order.NEWEST


def order_of(selected: Filter, order: Order, *, reverse: bool) -> str:
    """Return what to order the rows of a walk by, so that the planner sees that they are sorted."""
    way = _direction(order, reverse=reverse)
    # Where the walk has only one key, the planner knows that only inside the walk.
    single = (order is Order.LAST_USE and selected.never_used) or (
        order is Order.EXPIRY and selected.never_expires
    )
    return f"t.key_id {way}" if single else f"t.key {way}, t.key_id {way}"


def _direction(order: Order, *, reverse: bool) -> str:
    return "DESC" if (order is Order.NEWEST) != reverse else "ASC"


def walk(
    selected: Filter,
    order: Order,
    *,
    reverse: bool,
    now: datetime,
    start: Start | None,
    limit: int,
    arguments: Arguments,
    columns: str = "",
) -> str:
    """Return the SQL of the first `limit` tokens after `start`, not filtered. $1 is the account.

    Without `columns`, its columns are those of `token`, and `key`, `key_id` and `n`: the place in
    the order, and the number, from 1. With LAST_USE, it may contain deleted tokens: their columns
    of `token` are NULL or have a delete_time.
    """
    key, key_id = _KEYS[order]
    way = _direction(order, reverse=reverse)
    ordered = f"ORDER BY {key} {way}, {key_id} {way}"
    bounds = _bounds(selected, order, now, arguments)
    if start is not None:
        time, token_id = arguments.add(start.key, "timestamptz"), arguments.add(start.id, "text")
        bounds.append(f"({key}, {key_id}) {'<' if way == 'DESC' else '>'} ({time}, {token_id})")
    where = "".join(f" AND {bound}" for bound in bounds)
    account = arguments.sql(1, "text")
    # As a subquery, so that the planner does not see how many tokens it may read. It then expects
    # to stop early, and walks along the index. Otherwise it would read and sort a whole account
    # that it believes to be smaller than the limit, whatever its size.
    bounded = f"{ordered} LIMIT (SELECT {limit})"
    numbered = f"{key} AS key, {key_id} AS key_id, row_number() OVER ({ordered}) AS n"
    if order is Order.LAST_USE:
        return f"""
            SELECT {columns or "w.key, w.key_id, w.n, t.*"}
              FROM (SELECT {numbered}
                      FROM {_source("token_last_use u", "u.token_id", selected, arguments)}
                     WHERE u.account_id = {account}{where}
                     {bounded}) w
              LEFT JOIN LATERAL (
                   -- By id alone: without statistics, the planner prefers an index of the account.
                   SELECT * FROM token t WHERE t.id = w.key_id OFFSET 0) t ON true"""  # noqa: S608 - constants, and conditions without values
    return f"""
            SELECT {columns or f"{numbered}, t.*"}
              FROM {_source("token t", "t.id", selected, arguments)}
             WHERE t.account_id = {account} AND t.delete_time IS NULL{where}
             {bounded}"""  # noqa: S608 - constants, and conditions without values


def _source(table: str, column: str, selected: Filter, arguments: Arguments) -> str:
    """Return the table, or with `ids` only these of its rows."""
    if not selected.ids:
        return table
    ids = arguments.add(selected.ids, "text[]")
    # OFFSET 0: the planner must find the tokens by their ids, whatever the order.
    return f"(SELECT * FROM {table} WHERE {column} = ANY({ids}) OFFSET 0) {table[-1]}"  # noqa: S608 - constants


def _bounds(selected: Filter, order: Order, now: datetime, arguments: Arguments) -> list[str]:
    """Return conditions on the key that hold for every token that matches."""
    bounds = []
    if order is Order.EXPIRY:
        if selected.expires_before is not None:
            bounds.append(f"{_EXPIRY} < {arguments.add(selected.expires_before, 'timestamptz')}")
        if selected.never_expires is not None:
            sign = "=" if selected.never_expires else "<"
            bounds.append(f"{_EXPIRY} {sign} 'infinity'::timestamptz")
        if selected.state == State.EXPIRED:
            bounds.append(f"{_EXPIRY} <= {arguments.add(now, 'timestamptz')}")
        if selected.state == State.ACTIVE or selected.can_write:
            bounds.append(f"{_EXPIRY} > {arguments.add(now, 'timestamptz')}")
    elif order is Order.LAST_USE:
        # The table may be behind the last use, but never ahead of it, and it has every first use.
        if selected.unused_since is not None:
            since = arguments.add(selected.unused_since, "timestamptz")
            bounds.append(f"u.last_used_time < {since}")
        if selected.never_used is not None:
            sign = "=" if selected.never_used else ">"
            bounds.append(f"u.last_used_time {sign} '-infinity'::timestamptz")
    return bounds
