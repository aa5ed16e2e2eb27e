"""URLs as providers of Postgres hand them out, and as other tools expect them."""

import ssl
from pathlib import Path

import pytest
from latchkey_service.settings import database_url
from latchkey_service.settings.loading import ConfigError, load

PLAIN = "postgresql://u:p@h:5432/db"


@pytest.mark.parametrize(
    ("query", "kept"),
    [
        # Neon
        ("?sslmode=require&channel_binding=require", "?sslmode=require"),
        (
            "?options=endpoint%3Dep-cool&sslmode=require",
            "?options=endpoint%3Dep-cool&sslmode=require",
        ),
        # Supabase, Azure
        ("?sslmode=require", "?sslmode=require"),
        # RDS
        ("?sslmode=verify-full&sslrootcert=/rds.pem", "?sslmode=verify-full&sslrootcert=/rds.pem"),
        # Cloud SQL
        ("?host=/cloudsql/project:region:db", "?host=/cloudsql/project:region:db"),
        # libpq
        ("?connect_timeout=10&keepalives=1&keepalives_idle=30", ""),
        ("?gssencmode=disable&target_session_attrs=read-write&application_name=x", ""),
        ("?sslrootcert=system&sslmode=verify-full&search_path=a", "?search_path=a"),
        ("?sslrootcert=system", ""),
        ("", ""),
    ],
)
def test_what_the_driver_gets(query: str, kept: str) -> None:
    """Parameters of libpq are honoured by the driver, or dropped before the driver sends them to
    the server as settings."""
    assert database_url.problem(PLAIN + query) is None
    assert database_url.for_driver(PLAIN + query) == PLAIN + kept


@pytest.mark.parametrize(
    ("query", "advice"),
    [
        ("?pgbouncer=true", "set LATCHKEY_POOLER=transaction"),
        ("?schema=tokens", "search_path=NAME"),
        ("?ssl=true", "sslmode=require"),
        ("?connection_limit=5", "Prisma"),
        ("?conect_timeout=5", "conect_timeout is not supported"),
        ("?gssencmode=require", "sslmode=verify-full"),
        ("?sslrootcert=system&sslmode=require", "requires sslmode=verify-full"),
        ("?sslmode", "NAME=VALUE"),
        ("?hunter2%2F%2B=x", "with an unusual name"),
    ],
)
def test_unsupported_parameters_are_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, query: str, advice: str
) -> None:
    """The start fails with a sentence that says what to do, and quotes nothing that could be a
    password."""
    monkeypatch.setenv("LATCHKEY_DATABASE_URL", PLAIN + query)
    with pytest.raises(ConfigError, match=r"^LATCHKEY_DATABASE_URL: ") as caught:
        load()
    assert advice in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_channel_binding_is_not_promised() -> None:
    """A URL that requires channel binding causes a warning with what protects as well."""
    (text,) = database_url.warnings(PLAIN + "?channel_binding=require")
    assert "sslmode=verify-full" in text
    assert database_url.warnings(PLAIN + "?channel_binding=prefer") == []


def test_the_systems_authorities() -> None:
    """`sslrootcert=system` checks the name and the CA, with the CAs of the operating system."""
    context = database_url.tls_context(PLAIN + "?sslrootcert=system")
    assert context is not None
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert database_url.tls_context(PLAIN + "?sslmode=require") is None


def test_missing_files_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each missing TLS file is named, from the URL or the environment."""
    missing, there = tmp_path / "missing.pem", tmp_path / "there.pem"
    there.touch()
    monkeypatch.setenv("PGSSLCERT", str(missing))
    found = database_url.file_problems(f"{PLAIN}?sslrootcert={missing}&sslkey={there}")
    assert found == [
        f"sslrootcert of the database: {missing}: No such file or directory",
        f"sslcert of the database: {missing}: No such file or directory",
    ]
    monkeypatch.delenv("PGSSLCERT")
    assert database_url.file_problems(f"{PLAIN}?sslrootcert=system") == []
