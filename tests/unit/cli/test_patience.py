"""How long `latchkey import` keeps trying a batch that the service refuses for now."""

from collections.abc import Coroutine, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from latchkey import (
    Client,
    ImportedToken,
    ImportResult,
    LatchkeyError,
    ResourceExhausted,
    Scope,
    Unavailable,
)
from latchkey_cli import importing
from latchkey_cli.main import main

from tests.helpers.tool import NOWHERE


class Service:
    """Stands in for a client whose own attempts fail with these errors, and then succeed."""

    def __init__(self, *errors: LatchkeyError) -> None:
        self.errors = list(errors)
        self.calls = 0

    async def import_tokens(self, _tokens: Sequence[ImportedToken], **_: Any) -> Any:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return ()


class Time:
    """Time that passes only while `_import` sleeps."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(importing, "time", time)
    monkeypatch.setattr(importing, "asyncio", time)
    return time


def overloaded(seconds: float = 1.0) -> LatchkeyError:
    return ResourceExhausted("busy", reason="OVERLOADED", retry_after=timedelta(seconds=seconds))


async def send(service: Service, *, answered: bool = False) -> tuple[ImportResult, ...]:
    progress = importing._Progress("keys.csv", dry_run=False, as_json=True, answered=answered)
    return await importing._import(cast("Client", service), (), progress)


class Session:
    """Stands in for a session, whose calls never wait because time is simulated."""

    def __init__(self, service: Service) -> None:
        self.client = service

    def run(self, call: Coroutine[Any, Any, Any], _doing: object) -> Any:
        with pytest.raises(StopIteration) as done:
            call.send(None)
        return done.value.value


async def test_import_outlasts_load_and_failover(passing: Time) -> None:
    """An import continues after refusals that the library's own attempts do not outlast, and waits
    as long as the service asks."""
    away = Unavailable("away", reason="DATABASE_UNAVAILABLE", retry_after=timedelta(seconds=2))
    service = Service(*(overloaded() for _ in range(30)), away)
    assert await send(service) == ()
    assert service.calls == 32
    assert passing.now == 1_032.0


async def test_import_gives_up(passing: Time) -> None:
    """After a minute of refusals, the import fails with the last one."""
    service = Service(*(overloaded() for _ in range(100)))
    with pytest.raises(ResourceExhausted):
        await send(service)
    assert service.calls == importing.PATIENCE_SECONDS
    assert passing.now < 1_000.0 + importing.PATIENCE_SECONDS


def test_import_outlasts_a_restart(passing: Time) -> None:
    """Once the service has answered a batch, the import continues although nothing listens for a
    few seconds."""
    gone = [Unavailable("no connection") for _ in range(20)]
    closed = Unavailable("closed", reason="CONNECTION_CLOSED")
    service = Service()
    progress = importing._Progress("keys.csv", dry_run=False, as_json=True)
    token = ImportedToken(
        account_id="acme", name="deploy", scope=Scope.READ, secret_sha256=bytes(32)
    )
    for errors in ([], [*gone, closed]):
        service.errors += errors
        importing._call(cast("Any", Session(service)), [importing._Line(1, token)], progress)
    assert service.calls == 23
    assert passing.now == 1_021.0


async def test_import_outlasts_a_restart_after_a_refusal(passing: Time) -> None:
    """A refusal is an answer, too."""
    service = Service(overloaded(), Unavailable("no connection"))
    assert await send(service) == ()
    assert passing.now == 1_002.0


async def test_import_gives_up_if_the_service_does_not_return(passing: Time) -> None:
    """After a minute without an answer, the import fails."""
    service = Service(*(Unavailable("no connection") for _ in range(100)))
    with pytest.raises(Unavailable):
        await send(service, answered=True)
    assert passing.now < 1_000.0 + importing.PATIENCE_SECONDS
    assert service.calls == importing.PATIENCE_SECONDS


@pytest.mark.parametrize(
    "error",
    [Unavailable("not trusted", reason="TLS_HANDSHAKE_FAILED"), ResourceExhausted("too large")],
)
async def test_import_does_not_wait_for_what_a_restart_cannot_cure(
    passing: Time, error: LatchkeyError
) -> None:
    """A request that is too large and a certificate that is not trusted fail at once, even later
    in an import."""
    service = Service(error)
    with pytest.raises(type(error)):
        await send(service, answered=True)
    assert (service.calls, passing.now) == (1, 1_000.0)


async def test_import_waits_for_a_service_that_starts(
    passing: Time, capsys: pytest.CaptureFixture[str]
) -> None:
    """The import waits some seconds for a service that is away from the start, and says so once,
    because the target may be wrong. It then fails with the last error."""
    service = Service(*(Unavailable("no connection") for _ in range(10)))
    assert await send(service) == ()
    assert passing.now == 1_010.0
    said = "nothing answers at 127.0.0.1:50051; trying again for 15 s\n"
    assert capsys.readouterr().err == said
    service.errors += [Unavailable("no connection") for _ in range(100)]
    with pytest.raises(Unavailable):
        await send(service)
    assert passing.now < 1_010.0 + importing.START_PATIENCE_SECONDS
    assert capsys.readouterr().err == said


async def test_import_waits_longer_for_a_service_that_answered(passing: Time) -> None:
    """The first answer may be a refusal after a start: from then on, the target is right."""
    gone = [Unavailable("no connection") for _ in range(14)]
    service = Service(*gone, overloaded(), *gone)
    assert await send(service) == ()
    assert passing.now == 1_029.0


@pytest.mark.parametrize(
    "error",
    [Unavailable("closed", reason="CONNECTION_CLOSED"), ResourceExhausted("too large")],
)
async def test_import_does_not_repeat_what_waiting_cannot_cure(
    passing: Time, error: LatchkeyError
) -> None:
    """Without a delay from the service, the import fails at once: the service requires TLS, or the
    request is too large."""
    service = Service(error)
    with pytest.raises(type(error)):
        await send(service)
    assert (service.calls, passing.now) == (1, 1_000.0)


def test_import_that_no_service_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It fails with the exit code of an unreachable service, and says that it can be repeated."""
    monkeypatch.setattr(importing, "START_PATIENCE_SECONDS", 0.1)
    file = tmp_path / "keys.csv"
    file.write_text(f"hash,account,name,scope\n{'00' * 32},acme,a,read\n")
    monkeypatch.setattr("sys.argv", ["latchkey", "--target", NOWHERE, "import", str(file)])
    assert main() == 6
    assert "it skips what is already imported" in capsys.readouterr().err
