"""What a start checks (settings, peppers), rotation of peppers, and the purge of tombstones."""

import asyncio
import math
import os
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from latchkey_service.postgres.connections import Connector, Pool
from latchkey_service.secret_format import Keyring, Pepper
from latchkey_service.tokens import pepper_file
from latchkey_service.tokens.batched_lookup import Lookup
from latchkey_service.tokens.management import Created, NewToken, Tokens
from latchkey_service.tokens.pepper_file import PepperFileError
from latchkey_service.tokens.token_store import TokenStore
from latchkey_service.tokens.upkeep_store import UpkeepStore
from latchkey_service.tokens.verdict import Scope, Verdict

from tests.helpers.databases import session
from tests.helpers.domain import BelievedReads, audit_context, find
from tests.helpers.service_process import PYTHON, Service
from tests.helpers.waiting import WAIT_SECONDS, eventually

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

OLD, NEW = Pepper(b"o" * 32), Pepper(b"n" * 32)
DAY = timedelta(days=1)

Run = Callable[..., Service]


def write_peppers(path: Path, *used: Pepper, mode: int = 0o600) -> Path:
    path.write_text("# newest first\n" + "".join(f"{pepper.key.hex()}\n" for pepper in used))
    path.chmod(mode)
    return path


@pytest.fixture
def run(tmp_path: Path, database_url: str) -> Iterator[Run]:
    """Start services on a fresh database; the fixture stops them."""
    started: list[Service] = []

    def run(*python: str, **settings: object) -> Service:
        defaults = {"listen": "127.0.0.1:0", "data_dir": tmp_path / "data", "log_format": "json"}
        settings = defaults | {"database_url": database_url} | settings
        started.append(Service(tmp_path / f"service {len(started)}", python or None, **settings))
        return started[-1]

    yield run
    for service in started:
        service.clean_up()


@pytest.fixture
async def upkeep(database_url: str) -> AsyncIterator[UpkeepStore]:
    """The store that removes rows."""
    pool = await Pool.open(Connector(database_url))
    yield UpkeepStore(pool)
    await pool.close()


async def make(store: TokenStore, keyring: Keyring, name: str = "first") -> Created:
    for pepper in keyring.peppers:
        await store.register_pepper(pepper.id)
    tokens = Tokens(
        store,
        keyring,
        None,  # type: ignore[arg-type]  # nothing is deleted through it
        BelievedReads(),
        "lk",
        lambda: datetime.now(UTC),
        os.urandom,
    )
    new = NewToken("acme", name, Scope.READ, None, None, {})
    return await tokens.create(new, audit_context(), math.inf)


async def verdict(database_url: str, keyring: Keyring, created: Created) -> Verdict:
    """Return the verdict of a server with this keyring, from its keys and the database alone."""
    digest = keyring.digest_of(created.secret.reveal())
    if digest is None:
        return Verdict.UNKNOWN
    lookup = Lookup(
        lambda: Connector(database_url).connect(),
        asyncio.get_running_loop().time,
        keyring,
    )
    try:
        record = (await find(lookup, digest, asyncio.get_running_loop().time() + 5)).record
    finally:
        await lookup.close()
    if record is None:
        return Verdict.UNKNOWN
    return Verdict.VALID if record.delete_time is None else Verdict.DELETED


async def test_all_invalid_settings_are_named(run: Run) -> None:
    """Each invalid setting is named with its allowed values before anything starts; exit code 2."""
    service = run(
        *PYTHON, listen="nowhere", workers=0, transport="pigeon", database_url="mysql://x:pw1@y"
    )
    assert await service.ended() == 2
    for name in ("LISTEN", "WORKERS", "TRANSPORT", "DATABASE_URL"):
        assert f"LATCHKEY_{name}: " in service.err
    assert "pw1" not in service.err
    assert "Traceback" not in service.err


async def test_a_named_pepper_file_must_exist(run: Run, tmp_path: Path) -> None:
    """A wrong path must not silently start a new set of keys: the start fails without a new one."""
    service = run(pepper_file=tmp_path / "nothing")
    assert await service.ended() == 1
    assert f"there is no pepper file at {tmp_path / 'nothing'}" in service.err
    assert "Traceback" not in service.err
    assert not (tmp_path / "nothing").exists()


async def test_a_pepper_file_that_others_can_read_is_rejected(run: Run, tmp_path: Path) -> None:
    """Mode 0644 is rejected, and the message says what to do about it."""
    path = write_peppers(tmp_path / "peppers", OLD, mode=0o644)
    service = run(pepper_file=path)
    assert await service.ended() == 1
    assert "chmod 600" in service.err
    assert OLD.key.hex() not in service.err


async def test_a_pepper_that_live_tokens_need_is_required(
    run: Run, tmp_path: Path, store: TokenStore
) -> None:
    """A start with a file that lacks a pepper of a live token fails, and the error names the id and
    the file. Once the token is deleted, the pepper may be removed."""
    created = await make(store, Keyring([OLD]))
    path = write_peppers(tmp_path / "peppers", NEW)
    service = run(pepper_file=path)
    assert await service.ended() == 1
    assert OLD.id in service.err
    assert str(path) in service.err
    assert NEW.id not in service.err
    await store.delete_token("acme", created.record.id, audit_context("Delete"))
    await run(pepper_file=path).welcome()


async def test_a_rejected_password_is_reported(run: Run, database_url: str) -> None:
    """A wrong password is reported at once, in a line that does not contain it."""
    user, _, rest = database_url.partition("@")
    wrong = user.rpartition(":")[0] + ":wrong-pass@" + rest
    service = run(database_url=wrong)
    assert await service.ended() == 1
    assert "password authentication failed" in service.err
    assert "wrong-pass" not in service.err
    assert "Traceback" not in service.err


async def test_an_unreachable_database_is_reported(run: Run) -> None:
    """A start that waits for its database logs this at once, in a line without the password."""
    service = run(database_url="postgresql://a:wrong-pass@127.0.0.1:1/b")
    line = await eventually(
        lambda: next((x for x in service.log if "waiting" in x["event"]), None), "the log says so"
    )
    assert line["event"] == "waiting for the database"
    assert (line["level"], line["seconds_max"]) == ("warning", 30)
    assert "Connect" in line["error"]
    assert "wrong-pass" not in service.err


async def test_rotation(tmp_path: Path, store: TokenStore, database_url: str) -> None:
    """With a new pepper on top, new tokens use it and secrets of the old one still verify. A server
    that lacks the new pepper verifies the tokens of the old one."""
    before = pepper_file.load_or_create(write_peppers(tmp_path / "a", OLD), create=False)
    old = await make(store, before, "old")
    after = pepper_file.load_or_create(write_peppers(tmp_path / "b", NEW, OLD), create=False)
    assert [pepper.id for pepper in after.peppers] == [NEW.id, OLD.id]
    new = await make(store, after, "new")
    async with session(database_url) as connection:
        used = await connection.fetch("SELECT token_id, pepper_id FROM secret")
    assert {row["token_id"]: row["pepper_id"] for row in used} == {
        old.record.id: OLD.id,
        new.record.id: NEW.id,
    }
    for created in (old, new):
        assert await verdict(database_url, after, created) is Verdict.VALID
    # The first step of a rotation prevents this: every server gets the new key below the old one.
    between = Keyring([OLD, NEW])
    assert await verdict(database_url, between, new) is Verdict.VALID
    assert await verdict(database_url, before, new) is Verdict.UNKNOWN


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "contains no key"),
        ("# nothing\n\n", "contains no key"),
        ("beef\n", "line 1: a key must be 64 hexadecimal digits"),
        (OLD.key.hex() + "\n" + OLD.key.hex() + "\n", "contains a key twice"),
        ("\udcff", "cannot read"),
    ],
)
def test_a_broken_pepper_file_is_reported(tmp_path: Path, text: str, complaint: str) -> None:
    """A file that cannot be used is rejected with the reason, which contains no key."""
    path = tmp_path / "peppers"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    path.chmod(0o600)
    with pytest.raises(PepperFileError, match=complaint) as caught:
        pepper_file.load_or_create(path, create=True)
    assert OLD.key.hex() not in str(caught.value)


def test_threads_that_start_at_once_share_one_pepper(tmp_path: Path) -> None:
    """Simultaneous starts create one pepper, even if all have the same process id, as in
    containers."""
    path = tmp_path / "peppers"
    (tmp_path / f".peppers.{os.getpid()}").write_text("of one that crashed")
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: pepper_file.load_or_create(path, create=True), range(32)))
    assert len({keyring.peppers[0].id for keyring in made}) == 1


async def test_old_tombstones_are_purged(
    store: TokenStore, upkeep: UpkeepStore, database_url: str
) -> None:
    """Only tombstones older than the retention are removed, at most a batch at a time, with
    everything that belongs to them. Afterwards their secrets are UNKNOWN; those of remaining
    tombstones are DELETED."""
    keyring = Keyring([OLD])
    live, young, *old = [await make(store, keyring, f"token {n}") for n in range(5)]
    for created in (young, *old):
        await store.delete_token("acme", created.record.id, audit_context("Delete"))
    now = datetime.now(UTC)
    async with session(database_url) as connection:
        for days, created in enumerate(old, 100):
            await connection.execute(
                "UPDATE token SET delete_time = $2 WHERE id = $1",
                created.record.id,
                now - days * DAY,
            )
        assert await upkeep.purge_tombstones(now - 90 * DAY, 2) == 2
        # The oldest first.
        assert await verdict(database_url, keyring, old[0]) is Verdict.DELETED
        assert await upkeep.purge_tombstones(now - 90 * DAY, 2) == 1
        assert await upkeep.purge_tombstones(now - 90 * DAY, 2) == 0
        for created in old:
            assert await verdict(database_url, keyring, created) is Verdict.UNKNOWN
        assert await verdict(database_url, keyring, young) is Verdict.DELETED
        assert await verdict(database_url, keyring, live) is Verdict.VALID
        for table, left in (("token", 2), ("secret", 2), ("deletion", 1)):
            assert await connection.fetchval(f"SELECT count(*) FROM {table}") == left  # noqa: S608


async def test_purges_do_not_wait_for_each_other(
    store: TokenStore, upkeep: UpkeepStore, database_url: str
) -> None:
    """A purge skips rows that another purge or a repeated Delete has locked. Many purges at once
    remove each tombstone exactly once."""
    keyring = Keyring([OLD])
    made: list[Any] = [await make(store, keyring, f"token {n}") for n in range(40)]
    for created in made:
        await store.delete_token("acme", created.record.id, audit_context("Delete"))
    before = datetime.now(UTC) + DAY
    async with session(database_url) as connection, connection.transaction():
        await connection.execute("SELECT FROM token WHERE id = $1 FOR UPDATE", made[0].record.id)
        # A purge that waited would fail long before this, after lock_timeout.
        async with asyncio.timeout(WAIT_SECONDS):
            gone = await asyncio.gather(*(upkeep.purge_tombstones(before, 10) for _ in range(8)))
            # Each purge may skip rows that others had locked, so repeat until none are left.
            while more := await upkeep.purge_tombstones(before, 10):
                gone.append(more)
        assert sum(gone) == len(made) - 1
    assert await upkeep.purge_tombstones(before, 10) == 1
