"""The environment of a target: nothing, a Postgres with known tokens, or Latchkey as a process.

The parent owns it, because libFuzzer ends the fuzzing process without any clean-up.
"""

import asyncio
import contextlib
import random
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from latchkey_service.postgres.migrate import bundled, migrate
from latchkey_service.secret_format import Keyring, Pepper
from latchkey_service.tokens.token_store import TokenStore
from latchkey_service.tokens.verdict import Scope, TokenRecord

from tests.helpers import callers
from tests.helpers.breakable_postgres import BreakablePostgres
from tests.helpers.domain import audit_context
from tests.helpers.free_ports import free_port
from tests.helpers.scratch import SCRATCH
from tests.helpers.service_process import PYTHON, Service

__all__ = ["ACCOUNT", "DELETED", "LIVE", "PEPPER", "surroundings"]

# A start takes seconds, and far longer on a busy machine, which must not end a long run.
START_SECONDS_MAX = 120.0
ACCOUNT = "acme"
PEPPER = Pepper(b"fuzz" * 8)
# The same in each run, so that an input that contains them behaves the same. Not with the usual
# prefix: the corpus contains them, and secret scanners must ignore it.
_chance = random.Random(1)  # noqa: S311 - repeatable
LIVE, DELETED = (Keyring([PEPPER]).mint("fuzz", _chance.randbytes) for _ in range(2))
LIVE_ID, DELETED_ID = "tok_" + "0" * 25 + "1", "tok_" + "0" * 25 + "2"


@contextlib.contextmanager
def surroundings(needs: str) -> Iterator[dict[str, str]]:
    """Start the environment that a target needs; yield the environment variables that describe
    it."""
    if needs == "nothing":
        yield {}
        return
    # Postgres' own account needs access.
    folder = Path(tempfile.mkdtemp(prefix="latchkey-fuzz-", dir=SCRATCH))
    folder.chmod(0o755)
    try:
        with _postgres(folder) if needs == "postgres" else _service(folder, needs) as variables:
            yield variables
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _postgres(folder: Path) -> Iterator[dict[str, str]]:
    postgres = BreakablePostgres(folder / "data")
    url = postgres.start()
    # No data needs to survive a crash of the machine.
    postgres.configure("fsync = off\nsynchronous_commit = off")
    try:
        asyncio.run(_plant(url))
        yield {"FUZZ_DATABASE_URL": url}
    finally:
        postgres.close()


async def _plant(url: str) -> None:
    """Create a live token and a deleted one."""
    await migrate(url, bundled())
    store = await TokenStore.open(url)
    try:
        await store.register_pepper(PEPPER.id)
        moment = datetime(2026, 1, 1, tzinfo=UTC)
        for number, (token_id, minted) in enumerate(((LIVE_ID, LIVE), (DELETED_ID, DELETED))):
            record = TokenRecord(
                token_id, ACCOUNT, f"token {number}", Scope.READ, moment, None, minted.hint
            )
            await store.insert_token(record, record.name, minted.digest, audit_context())
        await store.delete_token(ACCOUNT, DELETED_ID, audit_context("Delete"))
    finally:
        await store.close()


@contextlib.contextmanager
def _service(folder: Path, needs: str) -> Iterator[dict[str, str]]:
    settings: dict[str, object] = {
        "listen": "127.0.0.1:0",
        "data_dir": folder / "data",
        "grace_seconds": 0.5,
        "log_format": "json",
        # Without this, only root may read its memory and files.
        "core_dumps": "on",
        "transport": "grpcio" if needs == "grpcio" else "native",
    }
    variables = {}
    if needs == "native-policy":
        policy = folder / "policy.toml"
        policy.write_text(callers.policy_text())
        settings["policy"] = policy
    if needs in ("tls", "tls-policy"):
        target = f"127.0.0.1:{free_port()}"
        policy = folder / "policy.toml"
        policy.write_text(callers.policy_text())
        settings |= {"policy": policy, "tls_listen": target, **callers.write_server_files(folder)}
        if needs == "tls-policy":
            # With it, clients without a certificate could not connect.
            del settings["tls_client_ca"]
        for name in ("verifier", "manager"):
            identity = callers.spiffe_identity(callers.uri(name))
            (folder / f"{name}.pem").write_bytes(identity.certificate + identity.key)
        (folder / "ca.pem").write_bytes(callers.ca_pem())
        variables["FUZZ_TLS"] = str(folder)
    service = Service(folder / "service", PYTHON, **settings)
    try:
        address = asyncio.run(service.welcome(START_SECONDS_MAX))
        variables["FUZZ_ADDRESS"] = str(settings.get("tls_listen", address))
        (pid,) = service.worker_pids
        yield variables | {"FUZZ_PID": str(pid)}
        # The service's output, for the analysis of a finding.
        Path("build/fuzz").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "service" / "err", f"build/fuzz/service-{needs}.log")
    finally:
        service.clean_up()
