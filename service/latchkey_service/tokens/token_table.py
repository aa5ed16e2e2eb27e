"""The columns of tokens and secrets that statements read, and their conversion to records."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from latchkey_coherence.rate import RateLimit

from latchkey_service.coherence.snapshot import SNAPSHOT
from latchkey_service.tokens.verdict import Scope, SecretRecord, TokenRecord, TokenSecret

if TYPE_CHECKING:
    import asyncpg

__all__ = [
    "COLUMNS",
    "DETAILS",
    "FIND_BY_DIGEST",
    "USES",
    "detailed_record_of",
    "rate_columns",
    "record_of",
    "secret_of",
]

# What every reader of a token needs, in the order of TokenRecord. Not `last_used_time`: nothing has
# ever written that column, and a later release may drop it, once no host runs one that reads it.
COLUMNS = """t.id, t.account_id, t.name, t.scope, t.create_time, t.expire_time, t.hint, t.labels,
       t.delete_time, t.disable_time, t.allowed_networks, t.permissions, t.rate_count,
       t.rate_period_seconds, t.rate_burst"""
_COLUMN_COUNT = 15
# What owners see in addition: the secrets that work and the newest one, newest first, each with its
# last use, and the token's last use, from whichever of its secrets and callers it came. Needs
# `USES` in the FROM clause.
DETAILS = """t.description,
       (SELECT array_agg(ROW(s.hint, s.create_time, s.expire_time, s.retire_on_first_use,
                             u.times[array_position(u.hints, s.hint)], s.leak_report_time)
                         ORDER BY s.ordinal DESC)
          FROM (SELECT coalesce(nullif(x.hint, ''), t.hint) AS hint,
                       coalesce(x.create_time, t.create_time) AS create_time,
                       least(x.expire_time, x.retire_time) AS expire_time,
                       x.retire_on_first_use, x.ordinal, x.leak_report_time,
                       max(x.ordinal) OVER () AS newest
                  FROM secret x
                 WHERE x.token_id = t.id) s
         WHERE s.ordinal = s.newest OR s.expire_time IS NULL
            OR s.expire_time > statement_timestamp()) AS secrets,
       u.times[1] AS last_used_time, u.callers[1] AS last_used_by"""
_DETAIL_COUNT = 4
# All uses of the token `t`, the last one first. Each token's rows are read once, although both a
# secret's and the token's last use come from them: in a large table, each further search costs
# several pages.
USES = """CROSS JOIN LATERAL (
       SELECT array_agg(x.hint ORDER BY x.last_time DESC) AS hints,
              array_agg(x.last_time ORDER BY x.last_time DESC) AS times,
              array_agg(x.caller ORDER BY x.last_time DESC) AS callers
         FROM token_usage x
        WHERE x.token_id = t.id) u"""
_SCOPES = tuple(Scope)
_NO_LABELS: Mapping[str, str] = MappingProxyType({})

# The tokens with up to 1,000 digests, and the snapshot of the read.
FIND_BY_DIGEST = f"""
SELECT h.revision, h.mark, h.timeline,
       s.digest, s.pepper_id, s.expire_time, s.retire_time, s.retire_on_first_use, s.seal,
       s.ordinal,
       s.retire_on_first_use AND EXISTS (
           SELECT FROM secret o
            WHERE o.token_id = s.token_id AND o.ordinal < s.ordinal AND o.retire_time IS NULL),
       {COLUMNS}
  FROM {SNAPSHOT}
  LEFT JOIN (secret s JOIN token t ON t.id = s.token_id) ON s.digest = ANY($1::bytea[])
"""  # noqa: S608 - constants only
_SECRET = slice(3, 11)


def secret_of(row: "asyncpg.Record") -> SecretRecord:
    """Return the secret in a row of `FIND_BY_DIGEST`."""
    return SecretRecord(*row[_SECRET])


def record_of(row: "asyncpg.Record | tuple[Any, ...]") -> TokenRecord:
    """Return the token in the last columns of a row, those of `COLUMNS`."""
    # By position, not by name, because every Verify that looks up does this.
    return _record(row[-_COLUMN_COUNT:])


def detailed_record_of(row: "asyncpg.Record") -> TokenRecord:
    """Return the token in the last columns of a row, those of `COLUMNS` and `DETAILS`."""
    columns = row[-_COLUMN_COUNT - _DETAIL_COUNT :]
    description, secrets, last_used_time, last_used_by = columns[_COLUMN_COUNT:]
    return _record(columns[:_COLUMN_COUNT])._replace(
        description=description,
        secrets=tuple(TokenSecret(*secret) for secret in secrets or ()),
        last_used_time=last_used_time,
        last_used_by=last_used_by or "",
    )


def _record(columns: tuple[Any, ...]) -> TokenRecord:
    token_id, account, name, scope, created, expires, hint, labels, deleted, *rest = columns
    disabled, networks, permissions, *rate = rest
    return TokenRecord(
        token_id,
        account,
        name,
        _SCOPES[scope],
        created,
        expires,
        hint,
        _NO_LABELS if labels == "{}" else json.loads(labels),
        None,
        deleted,
        disabled,
        # Empty for most tokens: no copy.
        tuple(networks) if networks else (),
        tuple(permissions) if permissions else (),
        rate_limit=None if rate[0] is None else RateLimit(*rate),
    )


def rate_columns(limit: RateLimit | None) -> tuple[int | None, int | None, int | None]:
    """Return the values of the columns of a rate limit."""
    return (None, None, None) if limit is None else limit
