"""The webhook's settings and the file with its secrets."""

from pathlib import Path

import pytest
from latchkey_service.settings.loading import ConfigError, describe, from_json, load, to_json
from latchkey_service.settings.webhook import EVENTS, event_types
from latchkey_service.settings.webhook_secrets import WebhookError, read_secrets
from latchkey_service.tokens.event_table import EVENT_TYPES

GOOD = "whsec_" + "QUJD" * 8


def test_the_settings_name_every_event() -> None:
    """The types that the settings allow are those that the service records."""
    assert EVENTS == EVENT_TYPES


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("URL", "http://example.com/hook", "https"),
        ("URL", "http://127.0.0.1.example.com/", "https"),
        ("URL", "ftp://127.0.0.1/", "https"),
        ("URL", "https://user:word@example.com/", "without a user name"),
        ("URL", "https://", "HOST"),
        ("URL", "https://[::1", "URL"),
        ("URL", "https://example.com:x/", "URL"),
        ("EVENTS", "created,lost", "some of"),
        ("EVENTS", "all,created", "some of"),
        ("EXPIRING_DAYS", "0", "numbers of days"),
        ("EXPIRING_DAYS", "7,", "numbers of days"),
        ("EXPIRING_DAYS", ",".join(["1"] * 11), "numbers of days"),
        ("RETRY_DAYS", "0", "greater"),
        ("SECRET_FILE", "/x", "no effect without LATCHKEY_WEBHOOK_URL"),
    ],
)
def test_invalid_settings(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    """A setting that cannot work is refused at startup."""
    monkeypatch.setenv(f"LATCHKEY_WEBHOOK_{name}", value)
    with pytest.raises(ConfigError, match=words) as caught:
        load()
    assert "user:word" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["https://example.com/x", "http://localhost:80/", "http://[::1]:80/", "http://127.1.1.1/"],
)
def test_valid_url(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Https is accepted everywhere, http on loopback; the file with secrets is required."""
    monkeypatch.setenv("LATCHKEY_WEBHOOK_URL", url)
    with pytest.raises(ConfigError, match="LATCHKEY_WEBHOOK_SECRET_FILE: is required"):
        load()
    monkeypatch.setenv("LATCHKEY_WEBHOOK_SECRET_FILE", "/x")
    settings = load()
    received = from_json(to_json(settings).encode())
    assert received.webhook_url == settings.webhook_url


def test_url_is_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of the URL, which may contain a token, is not shown."""
    monkeypatch.setenv("LATCHKEY_WEBHOOK_URL", "https://example.com/hunter2?key=hunter2")
    monkeypatch.setenv("LATCHKEY_WEBHOOK_SECRET_FILE", "/x")
    shown = str(describe(load()))
    assert "https://example.com/***" in shown
    assert "hunter2" not in shown


def test_chosen_events() -> None:
    """A list of events means its types, and "all" means every type."""
    assert event_types("created, leaked") == {"created", "leaked"}
    assert event_types("all") == frozenset(EVENTS)


def test_secret_file(tmp_path: Path) -> None:
    """The file contains one secret a line, newest first, and comments."""
    path = tmp_path / "secret"
    path.write_text(f"# newest first\n{GOOD}  # June\n\n{GOOD}QUJD\n")
    path.chmod(0o600)
    assert read_secrets(path) == [GOOD, GOOD + "QUJD"]


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        ("", 0o600, "1-4 secrets"),
        (f"{GOOD}\n" * 5, 0o600, "1-4 secrets"),
        (GOOD.removeprefix("whsec_"), 0o600, "secret 1: must be whsec_"),
        ("whsec_QUJD", 0o600, "24-64 random bytes"),
        ("whsec_" + "QUJD" * 22, 0o600, "24-64 random bytes"),
        (GOOD + "A", 0o600, "secret 1"),
        ("whsec_\u00e9", 0o600, "not text"),
        (GOOD, 0o644, "not safe"),
    ],
)
def test_bad_secret_file(tmp_path: Path, text: str, mode: int, words: str) -> None:
    """A file that others can read, or without usable secrets, is refused, and not quoted."""
    path = tmp_path / "secret"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(WebhookError, match=words) as caught:
        read_secrets(path)
    assert "QUJDQUJD" not in str(caught.value).replace(str(tmp_path), "")


def test_missing_secret_file(tmp_path: Path) -> None:
    """The error names a file that is not there."""
    with pytest.raises(WebhookError, match="No such file"):
        read_secrets(tmp_path / "secret")
