"""`make bench ARGS="--sizes N"`: whether calls take as long among N tokens as among 10,000.

A separate run, because filling takes minutes. One cluster has both databases. In each round, each
call runs on both, one right after the other and in turn, so that neighbours on the machine slow
both alike. The figure is the median of the rounds' ratios of medians.
"""

import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.postgres.migrate import bundled, migrate
from latchkey_service.secret_format import Keyring
from latchkey_service.tokens import pepper_file as pepper_files

from tests.benchmarks import processes

__all__ = ["Ratio", "lines", "measure"]

SMALL = 10_000
# Tokens of the measured account. The others have accounts of 1,000.
ACCOUNT_MAX = 1_000_000
ACCOUNT = "bench"
RATIO_MAX = 1.15
# Secrets that are verified, spread over all tokens.
SECRETS = 2_000
ROUNDS = 9
CHUNK = 500_000
CALL_SECONDS_MAX = 30.0
NOW = datetime.now(UTC)
# The tables that are filled without their secondary indexes, which are built afterwards.
TABLES = ("token", "secret", "token_usage", "token_last_use")
_FILL = f"""
WITH numbers AS (SELECT n, 'tok_' || lpad(n::text, 26, '0') AS id,
                        timestamptz '2026-01-01Z' + n * interval '1 microsecond' AS made
                   FROM generate_series($1::bigint, $2::bigint) n),
tokens AS (
    INSERT INTO token (id, account_id, name, name_key, scope, create_time, expire_time, hint,
                       labels, disable_time, seal)
    SELECT id, CASE WHEN n < {ACCOUNT_MAX} THEN '{ACCOUNT}' ELSE 'other-' || n / 1000 END,
           'token ' || n, 'token ' || n, CASE WHEN n % 10 = 0 THEN 2 ELSE 1 END, made,
           CASE WHEN n % 3 = 0 THEN $3::timestamptz + (n % 1000 - 100) * interval '1 day' END,
           'lk_…' || lpad(to_hex(n % 65536), 4, '0'),
           CASE WHEN n % 100 = 0 THEN '{{"team": "data"}}' ELSE '{{}}' END::jsonb,
           CASE WHEN n % 50 = 0 THEN made END, ''
      FROM numbers),
uses AS (
    INSERT INTO token_usage (token_id, hint, caller, first_time, last_time)
    SELECT id, '', 'shop', made, $3::timestamptz - (n % 200) * interval '1 day'
      FROM numbers WHERE n % 3 <> 1),
orders AS (
    INSERT INTO token_last_use (token_id, account_id, last_used_time)
    SELECT id, CASE WHEN n < {ACCOUNT_MAX} THEN '{ACCOUNT}' ELSE 'other-' || n / 1000 END,
           CASE WHEN n % 3 <> 1 THEN $3::timestamptz - (n % 200) * interval '1 day'
                ELSE '-infinity' END
      FROM numbers)
-- Nobody has these secrets. Without seals, the service would seal a million rows during the run.
INSERT INTO secret (digest, pepper_id, token_id, create_time, seal)
SELECT decode(lpad(to_hex(n), 64, '0'), 'hex'), $4, id, made, ''
  FROM numbers WHERE n % $5::bigint <> 0
"""  # noqa: S608 - constants only

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Ratio:
    """How much longer a call takes in the large database. Times are in ms."""

    call: str
    small_ms: float
    large_ms: float
    ratio: float
    met: bool

    def document(self) -> dict[str, Any]:
        """Return it for the file."""
        return asdict(self)


async def _seed(url: str, name: str, tokens: int, keyring: Keyring) -> tuple[str, list[str]]:
    """Create and fill a database; return its URL and the secrets that can be verified."""
    connection = await asyncpg.connect(url)
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    url = urlunsplit(urlsplit(url)._replace(path=f"/{name}"))
    await migrate(url, bundled())
    connection = await asyncpg.connect(url)
    try:
        pepper = keyring.peppers[0].id
        await connection.execute("INSERT INTO pepper (id) VALUES ($1)", pepper)
        # Triggers and checks of foreign keys would take most of the time.
        for table in ("token", "token_usage"):
            await connection.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")
        keys = await connection.fetch(
            """
            SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint
             WHERE contype = 'f' AND conrelid = 'secret'::regclass
            """
        )
        for key, _ in keys:
            await connection.execute(f"ALTER TABLE secret DROP CONSTRAINT {key}")
        await connection.execute("SET maintenance_work_mem = '512MB'")
        indexes = await connection.fetch(
            """
            SELECT i.indexname, i.indexdef FROM pg_indexes i
             WHERE i.tablename = ANY($1::text[])
               AND NOT EXISTS (SELECT FROM pg_constraint c WHERE c.conname = i.indexname)
            """,
            list(TABLES),
        )
        for index, _ in indexes:
            await connection.execute(f"DROP INDEX {index}")
        step = tokens // SECRETS
        for start in range(0, tokens, CHUNK):
            end = min(start + CHUNK, tokens) - 1
            await connection.execute(_FILL, start, end, NOW, pepper, step)
            _say(f"  {name}: {end + 1:,} tokens")
        minted = [keyring.mint("lk", random.randbytes) for _ in range(0, tokens, step)]
        await connection.copy_records_to_table(
            "secret",
            columns=["digest", "pepper_id", "token_id", "hint"],
            records=(
                (mint.digest.value, pepper, f"tok_{n * step:026}", "lk_…real")
                for n, mint in enumerate(minted)
            ),
        )
        for _, definition in indexes:
            await connection.execute(definition)
        for key, definition in keys:
            await connection.execute(f"ALTER TABLE secret ADD CONSTRAINT {key} {definition}")
        for table in ("token", "token_usage"):
            await connection.execute(f"ALTER TABLE {table} ENABLE TRIGGER USER")
        for table in (*TABLES, "head"):
            await connection.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = false)")
        await connection.execute("VACUUM (ANALYZE)")
    finally:
        await connection.close()
    return url, [mint.secret.reveal() for mint in minted]


def _stamp(time: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(time)
    return message


def _lists(tokens: int) -> dict[str, pb.ListRequest]:
    """Return the measured lists of an account with so many tokens."""
    # In so many days, more tokens expire than fit on a page, even among 10,000.
    soon, before = _stamp(NOW + timedelta(days=21)), _stamp(NOW - timedelta(days=90))
    active = pb.TOKEN_STATE_ACTIVE
    spread = [f"tok_{n * (tokens // 100):026}" for n in range(100)]
    requests: dict[str, dict[str, Any]] = {
        "List": {},
        "List, oldest first": {"reverse": True},
        "List by expiry": {"order": pb.TOKEN_ORDER_EXPIRY},
        "List by last use": {"order": pb.TOKEN_ORDER_LAST_USE},
        "List with count": {"include_total_size": True},
        "scope": {"filter": pb.TokenFilter(scope=pb.SCOPE_WRITE)},
        "can write, with count": {
            "filter": pb.TokenFilter(can_write=True),
            "include_total_size": True,
        },
        "state disabled": {"filter": pb.TokenFilter(state=pb.TOKEN_STATE_DISABLED)},
        "label": {"filter": pb.TokenFilter(label={"team": "data"})},
        "search that finds": {"filter": pb.TokenFilter(search="token 99")},
        "search that finds nothing": {"filter": pb.TokenFilter(search="nobody")},
        "search by a secret's end": {"filter": pb.TokenFilter(search="zzzz")},
        "ids": {"filter": pb.TokenFilter(ids=spread)},
        "expiring soon": {
            "filter": pb.TokenFilter(expires_before=soon, state=active),
            "order": pb.TOKEN_ORDER_EXPIRY,
        },
        "expiring soon, newest first": {
            "filter": pb.TokenFilter(expires_before=soon, state=active)
        },
        "never expires, with count": {
            "filter": pb.TokenFilter(never_expires=True, state=active),
            "include_total_size": True,
        },
        "unused": {
            "filter": pb.TokenFilter(unused_since=before, never_used=False),
            "order": pb.TOKEN_ORDER_LAST_USE,
        },
        "never used": {
            "filter": pb.TokenFilter(never_used=True),
            "order": pb.TOKEN_ORDER_LAST_USE,
        },
        "old secrets, with count": {
            "filter": pb.TokenFilter(secret_created_before=before),
            "include_total_size": True,
        },
    }
    return {name: pb.ListRequest(account_id=ACCOUNT, **fields) for name, fields in requests.items()}


def _calls(
    stub: pb_grpc.TokenServiceStub, tokens: int, secrets: Sequence[str]
) -> dict[str, tuple[int, Call]]:
    """Return the measured calls, and how often each runs in a slice."""
    questions = itertools.cycle(
        [pb.VerifyRequest(secret=secret, required_scope=pb.SCOPE_READ) for secret in secrets]
    )
    numbers = itertools.count()

    def verify() -> None:
        answer = stub.Verify(next(questions), timeout=CALL_SECONDS_MAX)
        if not answer.token.id:
            raise SystemExit("a secret of the database is unknown")

    def create() -> None:
        request = pb.CreateRequest(
            account_id=ACCOUNT, name=f"new {next(numbers)}", scope=pb.SCOPE_READ
        )
        stub.Create(request, timeout=CALL_SECONDS_MAX)

    def lister(request: pb.ListRequest) -> Call:
        return lambda: stub.List(request, timeout=CALL_SECONDS_MAX)

    lists = _lists(min(tokens, ACCOUNT_MAX)).items()
    return {
        "Verify, reading": (100, verify),
        "Create": (30, create),
        **{name: (10, lister(request)) for name, request in lists},
    }


async def seeds(url: str, tokens: int, keyring: Keyring) -> list[tuple[str, list[str]]]:
    """Fill both databases, the small one first."""
    return [
        await _seed(url, "small", SMALL, keyring),
        await _seed(url, "large", tokens, keyring),
    ]


def measure(tokens: int, scratch: Path, placing: str, run: Callable[[Any], Any]) -> list[Ratio]:
    """Fill the databases, run the rounds, and return the ratios. `run` runs a coroutine."""
    cores = processes.cores(placing)
    with ExitStack() as stack:
        pepper_file = scratch / "peppers"
        keyring = pepper_files.load_or_create(pepper_file, create=True)
        url, _ = stack.enter_context(processes.postgres(scratch / "data", {cores.postgres}))
        began = time.monotonic()
        seeded = run(seeds(url, tokens, keyring))
        _say(f"Filled in {time.monotonic() - began:.0f} s")
        calls = []
        for name, size, (database, secrets) in zip(
            ("small", "large"), (SMALL, tokens), seeded, strict=True
        ):
            settings = {
                "DATABASE_URL": database,
                "PEPPER_FILE": str(pepper_file),
                "CACHE": "off",
            }
            server = stack.enter_context(
                processes.latchkey(scratch, name, settings, {cores.server})
            )
            channel = stack.enter_context(grpc.insecure_channel(server.address))
            calls.append(_calls(pb_grpc.TokenServiceStub(channel), size, secrets))
        return list(_ratios(*calls))


def _ratios(
    small: dict[str, tuple[int, Call]], large: dict[str, tuple[int, Call]]
) -> Iterator[Ratio]:
    order = random.Random(1)  # noqa: S311 - for order, not for secrets
    medians: dict[str, list[tuple[float, float]]] = {name: [] for name in small}
    for number in range(ROUNDS + 1):
        began = time.monotonic()
        for name in order.sample(list(small), len(small)):
            times: list[list[float]] = [[], []]
            # In turn, call by call: a neighbour that comes or goes meets both.
            for _ in range(small[name][0]):
                for place in order.sample((0, 1), 2):
                    call = (small, large)[place][name][1]
                    start = time.perf_counter()
                    call()
                    times[place].append((time.perf_counter() - start) * 1e3)
            # The first round fills the caches.
            if number:
                medians[name].append((statistics.median(times[0]), statistics.median(times[1])))
        _say(f"Round {number} of {ROUNDS}: {time.monotonic() - began:.0f} s")
    for name, pairs in medians.items():
        ratio = statistics.median(after / before for before, after in pairs)
        yield Ratio(
            name,
            round(statistics.median(before for before, _ in pairs), 2),
            round(statistics.median(after for _, after in pairs), 2),
            round(ratio, 2),
            ratio <= RATIO_MAX,
        )


def lines(ratios: Sequence[Ratio], tokens: int) -> list[str]:
    """Return the ratios as readable lines."""
    head = f"{'call':32} {SMALL:>10,} {tokens:>12,}   ratio (wanted: ≤ {RATIO_MAX})"
    return [
        head,
        *(
            f"{one.call:32} {one.small_ms:7.2f} ms {one.large_ms:9.2f} ms   {one.ratio:.2f}"
            f" {'PASS' if one.met else 'MISS'}"
            for one in ratios
        ),
    ]


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
