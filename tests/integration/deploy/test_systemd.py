"""The units for systemd."""

import os
import shutil
from pathlib import Path

import pytest
from latchkey_console.running import GRACE_SECONDS, MARGIN_SECONDS
from latchkey_service.settings.loading import load

from tests.helpers.programs import run
from tests.helpers.repository import ROOT

UNITS = ROOT / "deploy" / "systemd"
UNIT = (UNITS / "latchkey.service").read_text()
VERIFY_SECONDS = 30.0


@pytest.mark.parametrize("name", ["latchkey.service", "latchkey-console@.service"])
def test_systemd_accepts_the_unit(tmp_path: Path, name: str) -> None:
    """`systemd-analyze verify` finds no fault. The program is another one, because Latchkey is not
    installed here."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed here")
    lines = [
        "ExecStart=/bin/true" if line.startswith("ExecStart=") else line
        for line in (UNITS / name).read_text().splitlines()
    ]
    unit = tmp_path / name.replace("@", "@50080")
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


def test_console_unit_waits_for_its_shutdown() -> None:
    """The unit waits for requests in progress before systemd kills the console."""
    unit = (UNITS / "latchkey-console@.service").read_text()
    (start,) = (line for line in unit.splitlines() if line.startswith("ExecStart="))
    assert start.endswith("/latchkey console --listen 127.0.0.1:%i")
    (stop,) = (line for line in unit.splitlines() if line.startswith("TimeoutStopSec="))
    assert int(stop.partition("=")[2]) >= GRACE_SECONDS + MARGIN_SECONDS + 5
