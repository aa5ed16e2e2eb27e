"""Settings: what is refused, and that no password is ever shown."""

import pytest
from latchkey_service.config import ConfigError, describe, load

HIDDEN = "hunter2"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://u:{HIDDEN}@h/db",
        f"postgresql://u:{HIDDEN}@h:5432,[::1]:5433/db?sslmode=require",
        f"postgres://u:{HIDDEN}%2F%40@h",
        f"postgresql:///db?host=/run/postgresql&user=u&password={HIDDEN}",
    ],
)
def test_a_password_is_redacted(monkeypatch, url):
    """Wherever a URL may have a password, what is printed of it has none."""
    monkeypatch.setenv("LATCHKEY_DATABASE_URL", url)
    shown = str(describe(load()))
    assert HIDDEN not in shown
    assert "***" in shown


@pytest.mark.parametrize("odd", ["/", "#", "?", "@", "/@", "[", ":x@"])
def test_a_password_that_reads_as_something_else_is_refused(monkeypatch, odd):
    """A character that ends the password early is told, instead of showing what follows it."""
    monkeypatch.setenv("LATCHKEY_DATABASE_URL", f"postgresql://u:{odd}{HIDDEN}{odd}x@h:5432/db")
    with pytest.raises(ConfigError, match="LATCHKEY_DATABASE_URL: percent-encode") as caught:
        load()
    assert HIDDEN not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LISTEN", "50051"),
        ("LISTEN", "127.0.0.1:70000"),
        ("LISTEN", "unix:"),
        ("LISTEN", "unix:/" + "x" * 120),
        ("DATABASE_URL", "mysql://h/db"),
        ("WORKERS", "0"),
        ("TRANSPORT", "carrier-pigeon"),
        ("SECRET_PREFIX", "LK"),
        ("LOG_VERIFY_SHARE", "2"),
    ],
)
def test_a_wrong_setting_is_named(monkeypatch, name, value):
    """A wrong value is refused under the setting's name."""
    monkeypatch.setenv("LATCHKEY_" + name, value)
    with pytest.raises(ConfigError, match=f"^LATCHKEY_{name}: "):
        load()


def test_all_wrong_settings_are_named_at_once(monkeypatch):
    """Two mistakes are told in one go."""
    monkeypatch.setenv("LATCHKEY_WORKERS", "many")
    monkeypatch.setenv("LATCHKEY_TRANSPORT", "none")
    with pytest.raises(ConfigError) as caught:
        load()
    assert len(str(caught.value).splitlines()) == 2
