"""Settings: validation, misspelled names, and passwords that never appear in output."""

import copy
import inspect
import pickle
import pydoc
import re

import pytest
from latchkey_service.settings.loading import ConfigError, describe, from_json, load, to_json
from latchkey_service.settings.settings import Settings

from tests.helpers.repository import ROOT

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
def test_password_is_redacted(monkeypatch, url):
    """Output about a database URL never contains its password, wherever that is."""
    monkeypatch.setenv("LATCHKEY_DATABASE_URL", url)
    shown = str(describe(load()))
    assert HIDDEN not in shown
    assert "***" in shown


@pytest.mark.parametrize("odd", ["/", "#", "?", "@", "/@", "[", ":x@"])
def test_unescaped_password_is_rejected(monkeypatch, odd):
    """A character that would end the password early is an error; the rest is never shown."""
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
def test_invalid_setting_is_named(monkeypatch, name, value):
    """The error about an invalid value starts with the setting's name."""
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
def test_misspelled_setting_is_rejected(monkeypatch, tmp_path, where, name, meant):
    """Otherwise the service would silently run without that setting, such as its policy."""
    monkeypatch.chdir(tmp_path)
    if where == ".env":
        (tmp_path / ".env").write_text(f"{name}=x\n")
    else:
        monkeypatch.setenv(name, "x")
    with pytest.raises(ConfigError, match=rf"^{name}: unknown setting; did you mean {meant}\?"):
        load()


def test_variables_of_other_programs_are_ignored(monkeypatch):
    """Variables of the client library, the command line, the console, Kubernetes and the deployment
    do not count as misspelled settings."""
    root = ROOT
    texts = [
        path.read_text("utf-8") for path in (root / "clients").rglob("*") if path.suffix in SOURCES
    ]
    documents = ("docker-compose.yml", "README.md", "docs/settings.md")
    texts += [(root / name).read_text("utf-8") for name in documents]
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


def test_effective_transport_is_shown(monkeypatch):
    """The configuration shows the transport that the address implies, not the plain default."""
    monkeypatch.setenv("LATCHKEY_LISTEN", "0.0.0.0:50051")
    monkeypatch.setenv("LATCHKEY_INSECURE_LISTEN", "anonymous")
    shown = {name: (value, source) for name, value, source, _ in describe(load())}
    assert shown["LATCHKEY_TRANSPORT"] == ("grpcio", "default")


def test_all_invalid_settings_are_named_at_once(monkeypatch):
    """Two mistakes appear in one error."""
    monkeypatch.setenv("LATCHKEY_WORKERS", "many")
    monkeypatch.setenv("LATCHKEY_TRANSPORT", "none")
    with pytest.raises(ConfigError) as caught:
        load()
    assert len(str(caught.value).splitlines()) == 2


def test_settings_round_trip_to_a_worker(monkeypatch, tmp_path):
    """A worker gets the same settings, passwords included, and knows which were set. Its own
    environment and `.env` have no effect, even on settings that are set to None."""
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
def test_missing_settings(line):
    """An incomplete line of settings is an error."""
    with pytest.raises(ConfigError, match="received no settings"):
        from_json(line)


def test_the_databases_password_stays_hidden(monkeypatch):
    """Nothing that prints, inspects, copies or pickles settings shows the database's password."""
    monkeypatch.setenv("LATCHKEY_DATABASE_URL", "postgresql://u:canary@h/db")
    settings = Settings(_env_file=None)
    assert settings.database_url is not None
    assert "canary" in settings.database_url.get_secret_value()
    shown = [
        repr(settings),
        str(settings),
        repr(vars(settings)),
        repr(settings.model_dump()),
        settings.model_dump_json(),
        repr(copy.deepcopy(settings)),
        repr(settings.model_copy(update={"workers": 2})),
        pydoc.render_doc(Settings),
        str(inspect.signature(Settings)),
        repr(describe(settings)),
    ]
    for text in shown:
        assert "canary" not in text
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(settings)
