"""What a start checks (settings, peppers), rotation of peppers, and the purge of tombstones."""

import asyncio
import math
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from latchkey_service.postgres.connections import connect
from latchkey_service.secret_format import Keyring, Pepper
from latchkey_service.tokens import pepper_file
from latchkey_service.tokens.batched_lookup import Lookup
from latchkey_service.tokens.management import Created, NewToken, Tokens
from latchkey_service.tokens.pepper_file import PepperFileError
from latchkey_service.tokens.token_store import TokenStore
from latchkey_service.tokens.verdict import Scope, Verdict

from tests.support import (
    WAIT_SECONDS,
    BelievedReads,
    Service,
    audit_context,
    eventually,
    session,
)

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
    """Start services on a fresh database; they end with the test."""
    started: list[Service] = []

    def run(**settings: object) -> Service:
        defaults = {"listen": "127.0.0.1:0", "data_dir": tmp_path / "data", "log_format": "json"}
        settings = defaults | {"database_url": database_url} | settings
        started.append(Service(tmp_path / f"service {len(started)}", **settings))
        return started[-1]

    yield run
    for service in started:
        service.clean_up()


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
    """What a server with this keyring answers, by its keys and the database alone."""
    digest = keyring.digest_of(created.secret.reveal())
    if digest is None:
        return Verdict.UNKNOWN
    lookup = Lookup(lambda: connect(database_url), asyncio.get_running_loop().time)
    try:
        record = (await lookup.find(digest, asyncio.get_running_loop().time() + 5)).record
    finally:
        await lookup.close()
    if record is None:
        return Verdict.UNKNOWN
    return Verdict.VALID if record.delete_time is None else Verdict.DELETED


async def test_wrong_settings_are_all_named(run: Run) -> None:
    """Each wrong setting is named, with what it should be, before anything is started: exit 2."""
    service = run(listen="nowhere", workers=0, transport="pigeon", database_url="mysql://x:pw1@y")
    assert await service.ended() == 2
    for name in ("LISTEN", "WORKERS", "TRANSPORT", "DATABASE_URL"):
        assert f"LATCHKEY_{name}: " in service.err
    assert "pw1" not in service.err
    assert "Traceback" not in service.err


async def test_a_named_pepper_file_has_to_be_there(run: Run, tmp_path: Path) -> None:
    """A wrong path must not silently start a new set of keys: it is refused, and none is made."""
    service = run(pepper_file=tmp_path / "nothing")
    assert await service.ended() == 1
    assert f"there is no pepper file at {tmp_path / 'nothing'}" in service.err
    assert "Traceback" not in service.err
    assert not (tmp_path / "nothing").exists()


async def test_a_pepper_file_that_others_may_read_is_refused(run: Run, tmp_path: Path) -> None:
    """Mode 0644 is refused with what to do about it."""
    path = write_peppers(tmp_path / "peppers", OLD, mode=0o644)
    service = run(pepper_file=path)
    assert await service.ended() == 1
    assert "chmod 600" in service.err
    assert OLD.key.hex() not in service.err


async def test_a_pepper_that_live_tokens_need_is_missed(
    run: Run, tmp_path: Path, store: TokenStore
) -> None:
    """A file that lacks a pepper of a live token is refused, naming its id and the file; once the
    token is deleted the pepper may go."""
    created = await make(store, Keyring([OLD]))
    path = write_peppers(tmp_path / "peppers", NEW)
    service = run(pepper_file=path)
    assert await service.ended() == 1
    assert OLD.id in service.err
    assert str(path) in service.err
    assert NEW.id not in service.err
    await store.delete_token("acme", created.record.id, audit_context("Delete"))
    await run(pepper_file=path).welcome()


async def test_a_database_that_refuses_is_told(run: Run, database_url: str) -> None:
    """A wrong password is told at once, in a line that does not show it."""
    user, _, rest = database_url.partition("@")
    wrong = user.rpartition(":")[0] + ":wrong-pass@" + rest
    service = run(database_url=wrong)
    assert await service.ended() == 1
    assert "password authentication failed" in service.err
    assert "wrong-pass" not in service.err
    assert "Traceback" not in service.err


async def test_a_database_that_is_away_is_told(run: Run) -> None:
    """While a start waits for its database it says so at once, in a line without the password."""
    service = run(database_url="postgresql://a:wrong-pass@127.0.0.1:1/b")
    line = await eventually(
        lambda: next((x for x in service.log if "waiting" in x["event"]), None), "it tells"
    )
    assert line["event"] == "waiting for the database"
    assert (line["level"], line["seconds_max"]) == ("warning", 30)
    assert "Connect" in line["error"]
    assert "wrong-pass" not in service.err


async def test_rotation(tmp_path: Path, store: TokenStore, database_url: str) -> None:
    """With a new pepper on top, the new one mints and secrets of the old one still verify; a
    server that does not have the new one yet verifies what it can."""
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
    # What the first step of a rotation is for: the new key below the old one, everywhere.
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
def test_a_broken_pepper_file_is_told(tmp_path: Path, text: str, complaint: str) -> None:
    """A file that cannot be used is refused with the reason, and no key in it."""
    path = tmp_path / "peppers"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    path.chmod(0o600)
    with pytest.raises(PepperFileError, match=complaint) as caught:
        pepper_file.load_or_create(path, create=True)
    assert OLD.key.hex() not in str(caught.value)


MAKE = """
import sys
from pathlib import Path
from latchkey_service.tokens import pepper_file

sys.stdin.readline()
print(*(p.id for p in pepper_file.load_or_create(Path(sys.argv[1]), create=True).peppers))
"""


def test_processes_that_make_peppers_at_once_get_the_same(tmp_path: Path) -> None:
    """Of several servers that find no file, one makes it and all use it, private and whole."""
    path = tmp_path / "new" / "peppers"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MAKE, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    with ThreadPoolExecutor(len(processes)) as threads:
        made = set(
            threads.map(lambda process: process.communicate("go\n", timeout=20)[0], processes)
        )
    assert len(made) == 1
    assert len(made.pop().split()) == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_threads_that_make_peppers_at_once_get_the_same(tmp_path: Path) -> None:
    """The same where the process id tells nothing apart, as between containers."""
    path = tmp_path / "peppers"
    (tmp_path / f".peppers.{os.getpid()}").write_text("of one that crashed")
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: pepper_file.load_or_create(path, create=True), range(32)))
    assert len({keyring.peppers[0].id for keyring in made}) == 1


async def test_old_tombstones_are_purged(store: TokenStore, database_url: str) -> None:
    """Only tombstones older than the retention go, at most a batch at a time, with all that
    belongs to them; the secret of one that went is UNKNOWN, of one that stays DELETED."""
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
        assert await store.purge_tombstones(now - 90 * DAY, 2) == 2
        # The oldest first.
        assert await verdict(database_url, keyring, old[0]) is Verdict.DELETED
        assert await store.purge_tombstones(now - 90 * DAY, 2) == 1
        assert await store.purge_tombstones(now - 90 * DAY, 2) == 0
        for created in old:
            assert await verdict(database_url, keyring, created) is Verdict.UNKNOWN
        assert await verdict(database_url, keyring, young) is Verdict.DELETED
        assert await verdict(database_url, keyring, live) is Verdict.VALID
        for table, left in (("token", 2), ("secret", 2), ("deletion", 1)):
            assert await connection.fetchval(f"SELECT count(*) FROM {table}") == left  # noqa: S608


async def test_purges_do_not_wait_for_each_other(store: TokenStore, database_url: str) -> None:
    """A purge passes over rows that another one, or a Delete that is asked again, has locked;
    many at once remove each tombstone once."""
    keyring = Keyring([OLD])
    made: list[Any] = [await make(store, keyring, f"token {n}") for n in range(40)]
    for created in made:
        await store.delete_token("acme", created.record.id, audit_context("Delete"))
    before = datetime.now(UTC) + DAY
    async with session(database_url) as connection, connection.transaction():
        await connection.execute("SELECT FROM token WHERE id = $1 FOR UPDATE", made[0].record.id)
        # Who waited would be told so by the database, long before this, after its lock_timeout.
        async with asyncio.timeout(WAIT_SECONDS):
            gone = await asyncio.gather(*(store.purge_tombstones(before, 10) for _ in range(8)))
            # Each may pass over what others held: until none finds more.
            while more := await store.purge_tombstones(before, 10):
                gone.append(more)
        assert sum(gone) == len(made) - 1
    assert await store.purge_tombstones(before, 10) == 1
