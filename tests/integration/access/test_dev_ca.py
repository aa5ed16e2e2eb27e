"""`latchkey dev-ca`: certificates for trying TLS, with the printed instructions."""

import subprocess
from pathlib import Path
from typing import Any

from latchkey import Access, Client
from latchkey_service.access import dev_ca
from latchkey_service.settings.settings import Settings

from tests.helpers.fork_server import Forked
from tests.helpers.servers import fresh_database, serving_as


def test_it_writes_private_keys_and_replaces_nothing(tmp_path: Path, forked: Forked) -> None:
    """Keys are private, and a second run leaves every file as it was."""
    command = forked("latchkey_service", "dev-ca", f"--output={tmp_path}/ca")
    first = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    files = {path.name: path.read_bytes() for path in (tmp_path / "ca").iterdir()}
    assert set(files) == set(dev_ca.FILES)
    for path in (tmp_path / "ca").glob("*.key"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert f"LATCHKEY_TLS_KEY={tmp_path}/ca/server.key" in first.stdout
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert second.returncode == 1
    assert "File exists" in second.stderr
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "ca").iterdir()}


async def test_a_service_and_a_caller_use_it_as_printed(
    tmp_path: Path, postgres_url: str, template_url: str, pepper_file: Path, capsys: Any
) -> None:
    """The service serves TLS with these files, and the caller of the printed policy entry is let
    in over the name localhost."""
    folder = tmp_path / "ca"
    assert dev_ca.run([f"--output={folder}", "--caller=shop.web"]) == 0
    said = capsys.readouterr().out
    entry = said[said.index("  [callers") : said.index("\nA caller")]
    (tmp_path / "policy.toml").write_text(entry)
    settings = Settings(
        database_url=await fresh_database(postgres_url),
        pepper_file=pepper_file,
        data_dir=tmp_path / "unused",
        listen="127.0.0.1:0",
        grace_seconds=0.2,
        policy=tmp_path / "policy.toml",
        tls_listen="127.0.0.1:0",
        tls_certificate=folder / "server.pem",
        tls_key=folder / "server.key",
        tls_client_ca=folder / "ca.pem",
    )
    async with serving_as(settings) as server:
        assert server.tls_address is not None
        access = Access(
            tls_ca=folder / "ca.pem",
            tls_certificate=folder / "client.pem",
            tls_key=folder / "client.key",
        )
        target = f"localhost:{server.tls_address.rpartition(':')[2]}"
        async with Client(target, access=access, timeout_seconds=20) as client:
            assert (await client.list_page("acme")).tokens == ()
