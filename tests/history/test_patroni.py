"""What a run under Patroni requires of Patroni."""

import shutil
from pathlib import Path

import pytest

from tests.history import patroni


@pytest.mark.parametrize(
    ("shown", "fits"), [("patroni 3.0.2", False), ("patroni 3.1.0", True), ("patroni 4.1.5", True)]
)
def test_patroni_that_keeps_outdated_copies_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: str, fits: bool
) -> None:
    """The run does not start with a Patroni that can stop replacing standbys, such as that of
    Debian 12."""
    for name in ("patroni", "etcd"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho {shown}\n", "utf-8")
        program.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(tmp_path / name))
    monkeypatch.setattr(patroni, "_probe", lambda *_: None)
    sentence = patroni.missing()
    assert (sentence is None) == fits
    if sentence is not None:
        assert f"is {shown}, which" in sentence
        assert "install 3.1 or later" in sentence
