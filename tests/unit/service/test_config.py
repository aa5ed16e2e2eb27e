"""Settings: what is refused, and that no password is ever shown."""

import re
from pathlib import Path

import pytest
from latchkey_service.config import ConfigError, Settings, describe, from_json, load, to_json

HIDDEN = "hunter2"
SOURCES = {".py", ".md"}


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
        ("DATABASE_URL", "postgresql://u@h1:5432,/db"),
        ("DATABASE_URL", "postgresql://u@,h2/db"),
        ("DATABASE_URL", "postgresql:///db?user=u&host=h1,h2"),
        ("DATABASE_URL", "postgresql:///db?host=h1%2ch2"),
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


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("LATCHKEY_POLCIY", "LATCHKEY_POLICY"),
        ("latchkey_polic", "LATCHKEY_POLICY"),
        ("LATCHKEY_TRUSTED_PROXYS", "LATCHKEY_TRUSTED_PROXY"),
        ("LATCHKEY_TLSLISTEN", "LATCHKEY_TLS_LISTEN"),
    ],
)
@pytest.mark.parametrize("where", ["environment", ".env"])
def test_a_misspelt_setting_is_told(monkeypatch, tmp_path, where, name, meant):
    """Without a word the service would run as if it were not set: without its policy, say."""
    monkeypatch.chdir(tmp_path)
    if where == ".env":
        (tmp_path / ".env").write_text(f"{name}=x\n")
    else:
        monkeypatch.setenv(name, "x")
    with pytest.raises(ConfigError, match=f"^{name}: .* {meant} is meant"):
        load()


def test_names_of_others_are_none_of_its(monkeypatch):
    """What the client library, the command line and the page are told by, what Kubernetes sets for
    services whose names begin so, and a deployer's own, is let be."""
    root = Path(__file__).parents[3]
    texts = [
        path.read_text("utf-8") for path in (root / "clients").rglob("*") if path.suffix in SOURCES
    ]
    texts += [(root / name).read_text("utf-8") for name in ("docker-compose.yml", "README.md")]
    others = {name for text in texts for name in re.findall(r"LATCHKEY_[A-Z_]+[A-Z]", text)}
    assert {"LATCHKEY_CONSOLE_TRUSTED_PROXY", "LATCHKEY_POSTGRES_PASSWORD"} <= others
    others |= {"LATCHKEY_TLS_CA", "LATCHKEY_TARGET", "LATCHKEY_ACCOUNT", "LATCHKEY_CREDENTIAL_FILE"}
    for service in ("", "_TLS", "_DATABASE", "_WORKERS", "_LISTEN"):
        start = "LATCHKEY" + service
        others |= {f"{start}_PORT", f"{start}_SERVICE_HOST", f"{start}_SERVICE_PORT"}
        others |= {f"{start}_PORT_50051_TCP_ADDR", f"{start}_SERVICE_PORT_GRPC"}
    others |= {"LATCHKEY_DATABASE_USER", "LATCHKEY_DATA", "LATCHKEY_LOG_FILE", "LATCHKEY_VERSION"}
    own = {"LATCHKEY_" + name.upper() for name in Settings.model_fields}
    for name in others - own:
        monkeypatch.setenv(name, "x")
    load()


def test_the_transport_in_force_is_shown(monkeypatch):
    """Not the default, where the address decides otherwise."""
    monkeypatch.setenv("LATCHKEY_LISTEN", "0.0.0.0:50051")
    monkeypatch.setenv("LATCHKEY_INSECURE_LISTEN", "anonymous")
    shown = {name: (value, source) for name, value, source, _ in describe(load())}
    assert shown["LATCHKEY_TRANSPORT"] == ("grpcio", "default")


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
