"""The command `receiver`: which settings it accepts, and what it hands on."""

import os
from typing import Any

import pytest
from latchkey_cli.failures import Exit, Failure
from latchkey_cli.receiver import receiver
from latchkey_console import extra
from latchkey_console.receiver import running
from latchkey_console.receiver.settings import Action, ReceiverSettings

KEYS = "https://api.github.com/meta/public_keys/secret_scanning"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ReceiverSettings]:
    """The settings of each receiver that was started."""
    found: list[ReceiverSettings] = []
    monkeypatch.setattr(running, "run", found.append)
    for name in ("TARGET", "TLS_CA", "TLS_CERTIFICATE", "TLS_KEY", "CREDENTIAL"):
        # So that monkeypatch restores the variable after the test.
        monkeypatch.setenv(f"LATCHKEY_{name}", os.environ.get(f"LATCHKEY_{name}", ""))
    return found


def test_settings_are_handed_on(started: list[ReceiverSettings]) -> None:
    """The receiver runs with the settings of the command, and at the target of its calls."""
    receiver(keys_url=KEYS, action="mark", listen="127.0.0.1:8000", target="127.0.0.1:7")
    (settings,) = started
    assert (settings.action, settings.host, settings.port) == (Action.MARK, "127.0.0.1", 8000)
    assert settings.target == "127.0.0.1:7"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"keys_url": KEYS, "action": "delete"}, "give revoke or mark"),
        ({}, "--keys-"),
        ({"keys_url": "http://keys.example.org"}, "https"),
        ({"keys_url": KEYS, "listen": "nowhere"}, "--listen"),
    ],
)
def test_wrong_settings_are_refused(
    started: list[ReceiverSettings], options: dict[str, Any], text: str
) -> None:
    """A wrong or missing option is a usage error that names it, and starts nothing."""
    with pytest.raises(Failure, match=text) as refused:
        receiver(**options)
    assert refused.value.exit_code == Exit.USAGE
    assert started == []


def test_missing_libraries_are_reported(
    started: list[ReceiverSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the extra, the command says how to install it."""
    monkeypatch.setattr(extra, "is_installed", lambda: False)
    with pytest.raises(Failure, match="pip install") as refused:
        receiver(keys_url=KEYS)
    assert refused.value.code == "RECEIVER_NOT_INSTALLED"
    assert started == []
