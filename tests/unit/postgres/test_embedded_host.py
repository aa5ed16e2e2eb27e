"""Programs that run for the embedded Postgres."""

import os
import signal
from pathlib import Path

import pytest
from latchkey_service.postgres.embedded_host import OsAccount, hold_signals, spawn

from tests.helpers.waiting import WAIT_SECONDS


def test_ctrl_c_during_a_fork_is_not_lost(tmp_path: Path) -> None:
    """Ctrl-C at the moment at which a program is started, when Python ignores exceptions, takes
    effect right afterwards. The program is known by then, and signals reach it."""
    armed = [True]

    def press_ctrl_c() -> None:
        if armed:
            armed.clear()
            signal.raise_signal(signal.SIGINT)

    # Nothing can remove it, so it does nothing after the first time.
    os.register_at_fork(after_in_parent=press_ctrl_c)
    account = OsAccount(os.geteuid(), os.getegid())
    process = None
    with (tmp_path / "log").open("wb") as log, pytest.raises(KeyboardInterrupt), hold_signals():
        process = spawn(["/bin/sleep", "60"], account, log, signal.SIGKILL, {})
    assert process is not None
    process.terminate()
    assert process.wait(WAIT_SECONDS) == -signal.SIGTERM
