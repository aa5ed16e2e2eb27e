"""The folder for a worker's temporary files."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from latchkey_service.process.worker_process import NotStarted, temporary_folder
from latchkey_service.settings.settings import Settings
from pygrpc_native import _server

NATIVE = Settings(transport="native")
# As docs/deploy.md says.
LENGTH_MAX = 58


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder with a short path."""
    folder = tempfile.mkdtemp(prefix="lk", dir="/tmp")
    yield Path(folder)
    shutil.rmtree(folder)


def use(root: Path, length: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the path of the folder for temporary files that long."""
    folder = root / ("x" * (length - len(str(root)) - 1))
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_the_longest_folder_fits(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transport's socket fits into the longest folder for temporary files that is allowed."""
    use(root, LENGTH_MAX, monkeypatch)
    with temporary_folder(NATIVE) as folder:
        assert folder is not None
        monkeypatch.setattr(tempfile, "tempdir", folder)
        _, socket = _server._fallback_socket()
        assert len(socket) == 107


def test_a_folder_that_is_too_long_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer folder is refused with the limit and what to do, and nothing is left in it. Without
    the transport's socket, it does not matter."""
    folder = use(root, LENGTH_MAX + 1, monkeypatch)
    with pytest.raises(NotStarted) as caught, temporary_folder(NATIVE):
        pass
    assert f"{folder}, and its path may have {LENGTH_MAX} characters at most" in str(caught.value)
    assert "TMPDIR" in str(caught.value)
    assert list(folder.iterdir()) == []
    with temporary_folder(Settings(transport="grpcio")) as unused:
        assert unused is None
