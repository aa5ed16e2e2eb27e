"""A rollout on one database, and its rollback: two releases serve side by side.

The earlier release is this one. The later release is a copy of its package with one more migration,
in a folder that Python searches first.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import latchkey_service
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.postgres.migrate import bundled
from latchkey_service.postgres.schema import newest

from tests.helpers.calls import is_serving
from tests.helpers.databases import session
from tests.helpers.service_process import Service
from tests.helpers.waiting import eventually

pytestmark = pytest.mark.slow("runs two releases")

OWN = newest(bundled())
EXPAND = f"""\
-- Releases from schema {OWN:04} work with this.
ALTER TABLE token ADD COLUMN team text NOT NULL DEFAULT '';
"""
CONTRACT = "ALTER TABLE token DROP COLUMN labels;\n"
CALL: Any = {"timeout": 30, "wait_for_ready": True}
OF: dict[str, Any] = {"account_id": "acme"}


class Copied(Service):
    """A service whose package is a copy in another folder."""

    def __init__(self, package: Path, folder: Path, **settings: object) -> None:
        self.prefix = ("env", f"PYTHONPATH={package}")
        super().__init__(folder, **settings)


def with_migration(folder: Path, sql: str) -> Path:
    """Copy the service into `folder`, with one more migration; return what Python searches."""
    package = folder / "latchkey_service"
    shutil.copytree(Path(latchkey_service.__file__).parent, package)
    (package / "postgres/migrations" / f"{OWN + 1:04}_next.sql").write_text(sql)
    return folder


class Fleet:
    """Starts services of both releases on one database, and stops them all."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self._folder = folder
        self._settings = settings
        self._running: list[Service] = []

    def start(self, package: Path | None = None) -> Service:
        """Start this release, or the one in `package`."""
        folder = self._folder / f"host{len(self._running)}"
        settings = {**self._settings, "data_dir": folder / "data"}
        made = Copied(package, folder, **settings) if package else Service(folder, **settings)
        self._running.append(made)
        return made

    def clean_up(self) -> None:
        for each in self._running:
            each.clean_up()


@pytest.fixture
def fleet(tmp_path: Path, database_url: str, pepper_file: Path) -> Iterator[Fleet]:
    """Hosts that share a database and its peppers."""
    made = Fleet(
        tmp_path,
        database_url=database_url,
        pepper_file=pepper_file,
        listen="127.0.0.1:0",
        log_format="json",
        grace_seconds=0.5,
    )
    yield made
    made.clean_up()


async def columns(url: str) -> set[str]:
    """Return the columns of the table of tokens."""
    async with session(url) as connection:
        rows = await connection.fetch(
            "SELECT attname FROM pg_attribute"
            " WHERE attrelid = 'token'::regclass AND NOT attisdropped"
        )
    return {row["attname"] for row in rows}


async def works_across(creator: str, other: str) -> None:
    """Check that a token created at one address is valid at the other, and dead at the first as
    soon as the other has deleted it."""
    async with (
        grpc.aio.insecure_channel(creator) as first,
        grpc.aio.insecure_channel(other) as second,
    ):
        for channel in (first, second):

            async def serves(of: grpc.aio.Channel = channel) -> bool:
                return await is_serving(of)

            await eventually(serves, "health is up")
        one, two = pb_grpc.TokenServiceStub(first), pb_grpc.TokenServiceStub(second)
        created = await one.Create(pb.CreateRequest(**OF, name="a", scope=pb.SCOPE_READ), **CALL)
        question = pb.VerifyRequest(secret=created.secret)
        for stub in (one, two):
            assert (await stub.Verify(question, **CALL)).verdict == pb.VERDICT_VALID
        changed = pb.RotateRequest(**OF, id=created.token.id)
        assert (await two.Rotate(changed, **CALL)).token.id == created.token.id
        await two.Delete(pb.DeleteRequest(**OF, id=created.token.id), **CALL)
        assert (await one.Verify(question, **CALL)).verdict == pb.VERDICT_DELETED


async def test_two_releases_serve_side_by_side(
    fleet: Fleet, database_url: str, tmp_path: Path
) -> None:
    """While a rollout replaces one host after another, both releases create, verify and delete each
    other's tokens on the newer schema. The earlier release starts again on it, so the rollout can
    be rolled back."""
    later = with_migration(tmp_path / "later", EXPAND)
    before = await (running := fleet.start()).welcome()
    assert "team" not in await columns(database_url)
    after = await fleet.start(later).welcome()
    assert "team" in await columns(database_url)
    await works_across(before, after)
    await works_across(after, before)
    assert await running.end() == 0
    rolled_back = await fleet.start().welcome()
    await works_across(rolled_back, after)
    await works_across(after, rolled_back)


async def test_a_contraction_keeps_earlier_releases_away(
    fleet: Fleet, database_url: str, tmp_path: Path
) -> None:
    """An earlier release does not start on a schema that lacks what it needs, and says which
    release to run."""
    later = fleet.start(with_migration(tmp_path / "later", CONTRACT))
    await eventually(
        lambda: any(line["event"] == "migrated" for line in later.log), "the migration is applied"
    )
    await later.end()
    assert "labels" not in await columns(database_url)
    refused = fleet.start()
    assert await refused.ended() == 1
    assert f"has migration {OWN + 1}, which this release does not know" in refused.err
    assert "run the release that applied it, or a newer one" in refused.err
