"""When the health check asks Postgres: rarely while all is well, at once after a failure."""

import asyncio
import itertools
from collections.abc import Callable

import pytest
from latchkey_service.errors import StoreUnavailable
from latchkey_service.process import periodic
from latchkey_service.process.periodic import follow_verifier

from tests.helpers.waiting import eventually


class Host:
    """What the health check sees of a worker, and its clock, which moves with each reading."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(periodic, "LOOK_SECONDS", 0.0)
        monkeypatch.setattr(periodic, "PROBE_SECONDS_WHILE_DOWN", 0.0)
        self.clock: Callable[[], int] = itertools.count().__next__
        self.checks = self.failures = 0
        self.doubt = self.down = False
        self.serving: list[bool] = []
        self.probe_seconds = 1e9

    async def check(self, deadline: float) -> None:
        self.checks += 1
        if self.down:
            raise StoreUnavailable("no answer")

    def begin(self) -> "asyncio.Task[None]":
        return asyncio.create_task(
            follow_verifier(
                self.check,
                self.clock,
                lambda: self.doubt,
                lambda: self.failures,
                self.serving.append,
                self.probe_seconds,
            )
        )


@pytest.mark.parametrize("sign", ["renewals fail", "a look-up failed"])
async def test_a_sign_of_failure_causes_a_check(monkeypatch: pytest.MonkeyPatch, sign: str) -> None:
    """While all is well there is one check per interval. A failed renewal or look-up causes one
    before the interval ends, and health follows its result."""
    host = Host(monkeypatch)
    following = host.begin()
    await eventually(lambda: host.serving == [True], "health is up")
    for _ in range(50):
        await asyncio.sleep(0)
    assert host.checks == 1
    host.down = True
    if sign == "renewals fail":
        host.doubt = True
    else:
        host.failures += 1
    await eventually(lambda: host.serving == [True, False], "health is down")
    host.down = host.doubt = False
    await eventually(lambda: host.serving == [True, False, True], "health is up again")
    following.cancel()


async def test_an_idle_worker_is_checked_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any sign of failure, the next check comes when the interval ends."""
    host = Host(monkeypatch)
    host.probe_seconds = 20
    following = host.begin()
    await eventually(lambda: host.checks >= 3, "three checks")
    host.down = True
    await eventually(lambda: host.serving == [True, False], "health is down")
    following.cancel()
