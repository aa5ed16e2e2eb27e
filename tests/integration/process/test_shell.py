"""What a shell's variables may change."""

from pathlib import Path

import pytest

from tests.helpers.service_process import service

# About other databases. The driver reads most of them.
VARIABLES = {
    "PGHOST": "nowhere.invalid",
    "PGPORT": "1",
    "PGUSER": "somebody",
    "PGDATABASE": "other",
    "PGSSLMODE": "verify-full",
    "PGSSLROOTCERT": "/nowhere.pem",
    "PGSERVICE": "nothing",
    "PGTARGETSESSIONATTRS": "standby",
    "PGGSSLIB": "nothing",
}


async def test_libpq_variables_do_not_reach_the_embedded_postgres(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variables in the shell that are about another database have no effect on the embedded one."""
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    settings = {"data_dir": scratch / "shell data", "listen": "127.0.0.1:0", "grace_seconds": 1}
    with service(scratch / "shell", **settings) as running:
        await running.welcome()
        assert await running.end() == 0
