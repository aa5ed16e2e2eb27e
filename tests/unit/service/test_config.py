"""Settings: what is refused, and that no password is ever shown."""

import pytest
from latchkey_service.config import ConfigError, describe, from_json, load, to_json

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


def test_settings_are_handed_over(monkeypatch, tmp_path):
    """Another process gets them as they are, passwords too, and knows which were set; what its own
    environment and `.env` say does not matter, nor what is set to nothing."""
    monkeypatch.chdir(tmp_path)
    given = {
        "DATABASE_URL": f"postgresql://u:{HIDDEN}@h:5432/db",
        "POLICY": "pol\xefcy.toml",
        "LISTEN": "unix:/run/latchkey.sock",
        "LEASE_SECONDS": "0.7",
        "CACHE": "off",
    }
    for name, value in given.items():
        monkeypatch.setenv("LATCHKEY_" + name, value)
    before = load()
    line = to_json(before.model_copy(update={"tls_listen": None}))
    for name in given:
        monkeypatch.delenv("LATCHKEY_" + name)
    monkeypatch.setenv("LATCHKEY_TRANSPORT", "grpcio")
    monkeypatch.setenv("LATCHKEY_TLS_LISTEN", "0.0.0.0:1")
    (tmp_path / ".env").write_bytes(b"LATCHKEY_SECRET_PREFIX=mine\nLATCHKEY_CACHE=\xff\n")
    after = from_json(line.encode())
    assert after.model_dump() == before.model_dump()
    assert after.model_fields_set == before.model_fields_set | {"tls_listen"}
    assert line.endswith("\n")
    assert "\n" not in line[:-1]


@pytest.mark.parametrize("line", [b"", b"{", b"null\n", b"[]\n", b"\xff\n"])
def test_settings_that_do_not_come(line):
    """What is no whole line of settings is told."""
    with pytest.raises(ConfigError, match="no settings came"):
        from_json(line)
