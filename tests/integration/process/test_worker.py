"""A worker starts only with exactly what the supervisor sends, and does not continue incomplete."""

import asyncio
import json
import os
import subprocess
from pathlib import Path

import pytest
from latchkey_service.process import wiring
from latchkey_service.process.wiring import running
from latchkey_service.settings.settings import Settings
from latchkey_service.tokens import pepper_file as pepper_files
from latchkey_service.tokens.token_store import TokenStore

from tests.helpers.fork_server import Forked
from tests.helpers.servers import make_settings
from tests.helpers.waiting import WAIT_SECONDS

PARTS = (
    "follow_peppers",
    "follow_verifier",
    "prune_log",
    "purge",
    "purge_audit",
    "log_counts_regularly",
)


@pytest.mark.parametrize("part", PARTS)
async def test_a_failed_task_is_reported(
    part: str,
    database_url: str,
    store: TokenStore,
    pepper_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If any background task fails, the owner of the worker is notified and can stop it."""
    failed = asyncio.Event()

    async def fail(*_: object) -> None:
        raise LookupError(part)

    monkeypatch.setattr(wiring, part, fail)
    settings: Settings = make_settings(database_url, pepper_file, "native")
    keyring = pepper_files.load_or_create(pepper_file, create=False)
    async with running(settings, keyring, on_failure=failed.set):
        await asyncio.wait_for(failed.wait(), WAIT_SECONDS)


async def test_a_graceful_stop_reports_no_failure(
    database_url: str, store: TokenStore, pepper_file: Path
) -> None:
    """A worker that starts and stops normally reports no failed task."""
    failed = asyncio.Event()
    settings = make_settings(database_url, pepper_file, "native")
    keyring = pepper_files.load_or_create(pepper_file, create=False)
    async with running(settings, keyring, on_failure=failed.set):
        await asyncio.sleep(0)
    assert not failed.is_set()


POLICY = '[callers.shop]\nroles = ["verifier"]\n'


@pytest.mark.parametrize(
    ("given", "policy", "message"),
    [
        ({"policy": "policy.toml"}, None, "a worker needs both"),
        ({}, POLICY, "a worker needs both"),
        ({"policy": "policy.toml"}, "[callers", "TOML"),
        ({"policy": "policy.toml"}, ..., "received no policy"),
        (
            {"trusted_proxy": "spiffe://example.org/proxy"},
            None,
            "LATCHKEY_TRUSTED_PROXY: has no effect",
        ),
        ({"workers": "many"}, None, "LATCHKEY_WORKERS: "),
        (None, None, "received no settings"),
    ],
)
def test_a_worker_rejects_incomplete_input(
    tmp_path: Path,
    pepper_file: Path,
    given: dict[str, str] | None,
    policy: object,
    message: str,
    forked: Forked,
) -> None:
    """The settings, peppers and policy that a worker receives must be consistent, whatever the
    environment, `.env` and the policy file contain. No message reveals a secret."""
    (tmp_path / "policy.toml").write_text(POLICY)
    (tmp_path / ".env").write_text("LATCHKEY_POLICY=policy.toml\nLATCHKEY_WORKERS=1\n")
    settings = {"database_url": "postgresql://u:hunter2@127.0.0.1:1/db", "log_format": "json"}
    keys = pepper_files.render(pepper_files.load_or_create(pepper_file, create=False))
    lines = "" if given is None else json.dumps(settings | given) + "\n" + keys
    ended = subprocess.run(
        forked("latchkey_service", "worker"),
        input=lines + ("" if policy is ... else json.dumps(policy) + "\n"),
        env=os.environ | {"LATCHKEY_POLICY": "policy.toml", "LATCHKEY_WORKERS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (ended.returncode in (1, 2), ended.stdout) == (True, "")
    assert message in ended.stderr
    for hidden in ("Traceback", "hunter2", keys.strip()):
        assert hidden not in ended.stderr
