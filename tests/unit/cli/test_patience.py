"""How long `latchkey import` keeps trying a batch that the service refuses for now."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

import pytest
from latchkey import (
    Client,
    ImportedToken,
    ImportResult,
    LatchkeyError,
    ResourceExhausted,
    Unavailable,
)
from latchkey_cli import importing


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


async def send(service: Service) -> tuple[ImportResult, ...]:
    return await importing._import(cast("Client", service), (), dry_run=False)


async def test_import_outlasts_load_and_failover(passing: Time) -> None:
    """An import goes on after refusals that the library's own attempts do not outlast, and waits
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


@pytest.mark.parametrize("error", [Unavailable("no connection"), ResourceExhausted("too large")])
async def test_import_does_not_repeat_what_waiting_cannot_cure(
    passing: Time, error: LatchkeyError
) -> None:
    """Without a delay from the service, the import fails at once: nothing listens at the address,
    or the request is too large."""
    service = Service(error)
    with pytest.raises(type(error)):
        await send(service)
    assert (service.calls, passing.now) == (1, 1_000.0)
