"""The service refuses keys and settings that another user can read or change."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.callers import policy_text, write_server_files
from tests.helpers.free_ports import free_port
from tests.helpers.service_process import Service

SOMEBODY = 12_345
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")

Run = Callable[..., Service]


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Path]:
    """The files of a service, as they should be."""
    files = write_server_files(tmp_path)
    files["policy"] = tmp_path / "policy.toml"
    files["policy"].write_text(policy_text())
    files["policy"].chmod(0o640)
    files["pepper_file"] = tmp_path / "peppers"
    files["pepper_file"].write_text("ab" * 32)
    files["pepper_file"].chmod(0o600)
    (tmp_path / "service").mkdir()
    files[".env"] = tmp_path / "service" / ".env"
    files[".env"].write_text("LATCHKEY_WORKERS=1\n")
    files[".env"].chmod(0o600)
    return files


@pytest.fixture
def run(given: dict[str, Path], tmp_path: Path, database_url: str) -> Iterator[Run]:
    started: list[Service] = []

    def run() -> Service:
        settings = {name: path for name, path in given.items() if name != ".env"}
        started.append(
            Service(
                tmp_path / "service",
                listen="127.0.0.1:0",
                tls_listen=f"localhost:{free_port()}",
                data_dir=tmp_path / "data",
                database_url=database_url,
                log_format="json",
                **settings,
            )
        )
        return started[-1]

    yield run
    for service in started:
        service.clean_up()


@pytest.mark.parametrize(
    ("name", "owner", "mode", "words"),
    [
        (".env", None, 0o666, "chmod 600"),
        pytest.param(".env", SOMEBODY, 0o600, "chown root", marks=needs_root),
        ("tls_key", None, 0o606, "chmod 600"),
        pytest.param("tls_key", SOMEBODY, 0o600, "chown root", marks=needs_root),
        ("policy", None, 0o666, "chmod 640"),
        ("tls_client_ca", None, 0o666, "chmod 644"),
        ("pepper_file", None, 0o604, "chmod 600"),
        pytest.param("pepper_file", SOMEBODY, 0o600, "chown root", marks=needs_root),
    ],
)
async def test_refused(
    run: Run, given: dict[str, Path], name: str, owner: int | None, mode: int, words: str
) -> None:
    """The start fails before anything serves, and the message names the file and the remedy."""
    given[name].chmod(mode)
    if owner is not None:
        os.chown(given[name], owner, -1)
    service = run()
    assert await service.ended() in (1, 2)
    assert words in service.err
    assert str(given[name]) in service.err
    assert "worker ready" not in service.err
    assert "Traceback" not in service.err


async def test_files_as_kubernetes_mounts_them(run: Run, given: dict[str, Path]) -> None:
    """Symbolic links into a folder of root's files work. A warning names each file that other users
    can read, and none that they cannot."""
    for name, mode in {"tls_key": 0o440, "pepper_file": 0o440, "policy": 0o644}.items():
        path = given[name]
        real = path.with_name(f"..data-{path.name}")
        path.rename(real)
        real.chmod(mode if os.geteuid() == 0 else mode & 0o704)
        path.symlink_to(real)
    service = run()
    await service.welcome()
    warned = [line["what_to_do"] for line in service.log if "not well protected" in line["event"]]
    (only,) = warned
    assert f"other users can read {given['policy']}; run: chmod 640" in only
