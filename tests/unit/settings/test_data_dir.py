"""Where data is kept by default."""

import os
from pathlib import Path

import platformdirs
import pytest
from latchkey_service.settings.loading import load


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container whose user has neither a home nor a name, the settings can be loaded."""

    def fail(*_: object, **__: object) -> str:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr(os, "geteuid", lambda: 12_345)
    monkeypatch.setattr(platformdirs, "user_data_dir", fail)
    assert load().data_dir == Path("/var/lib/latchkey")
