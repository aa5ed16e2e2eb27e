"""The unit for systemd."""

import os
import shutil
from pathlib import Path

import pytest
from latchkey_service.settings.settings import load

from tests.helpers.programs import run
from tests.helpers.repository import ROOT

UNIT = (ROOT / "deploy" / "systemd" / "latchkey.service").read_text()
VERIFY_SECONDS = 30.0


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """`systemd-analyze verify` finds no fault. The program is another one, because Latchkey is not
    installed here."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed here")
    lines = [
        "ExecStart=/bin/true" if line.startswith("ExecStart=") else line
        for line in UNIT.splitlines()
    ]
    unit = tmp_path / "latchkey.service"
    unit.write_text("\n".join(lines))
    command = ("systemd-analyze", "verify", "--man=no", str(unit))
    code, said = run(command, VERIFY_SECONDS, dict(os.environ))
    assert (code, said) == (0, "")
    unit.write_text("\n".join([*lines[:-1], "Wanted=multi-user.target"]))
    assert run(command, VERIFY_SECONDS, dict(os.environ))[1], "it finds an unknown name"


def test_the_unit_waits_for_the_shutdown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The settings of the unit exist, and systemd waits for the drain and the grace period before
    it kills the service."""
    (line,) = (line for line in UNIT.splitlines() if line.startswith("Environment="))
    monkeypatch.chdir(tmp_path)
    for pair in line.removeprefix("Environment=").split():
        monkeypatch.setenv(*pair.split("="))
    settings = load()
    (stop,) = (line for line in UNIT.splitlines() if line.startswith("TimeoutStopSec="))
    assert int(stop.partition("=")[2]) >= settings.drain_seconds + settings.grace_seconds + 5
