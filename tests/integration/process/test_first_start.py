"""A service whose first worker does not start says why."""

import asyncio
import re
import subprocess

import pytest
from latchkey_service.process import supervisor
from latchkey_service.settings.settings import Settings


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (("false",), "failed to start; see its log above"),
        (("sleep", "60"), "was not ready within 0.1 s: this machine is too busy; start again"),
    ],
)
async def test_the_first_start_of_a_worker_fails(
    monkeypatch: pytest.MonkeyPatch, program: tuple[str, ...], words: str
) -> None:
    """The message distinguishes a worker that ended, whose log says why, from one that is too slow,
    which has logged nothing."""
    settings = Settings(_env_file=None)
    keeper = supervisor._Supervisor(settings, "postgresql://h", "127.0.0.1:0", None, None, None)

    async def spawn(_: str | None, _number: int) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *program, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    monkeypatch.setattr(keeper, "_spawn", spawn)
    if program[0] == "sleep":
        monkeypatch.setattr(supervisor, "READY_TIMEOUT_SECONDS", 0.1)
    with pytest.raises(supervisor.StartError, match=re.escape(f"worker 0 {words}") + r"\Z"):
        await keeper._keep(0, asyncio.Event())
