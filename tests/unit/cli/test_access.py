"""Passing the access options to the console, which reads them from the environment."""

import os
from pathlib import Path

import pytest
from latchkey import Access
from latchkey_cli import access

from tests.helpers.callers import ca_pem, credential, dns_identity


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files, and an environment without access settings."""
    identity = dns_identity("page.internal")
    (tmp_path / "own.pem").write_bytes(identity.certificate)
    (tmp_path / "own.key").write_bytes(identity.key)
    (tmp_path / "ca.pem").write_bytes(ca_pem())
    (tmp_path / "credential").write_text(credential("page"))
    monkeypatch.setattr(access, "_options", {})
    for name in ("TLS_CA", "TLS_CERTIFICATE", "TLS_KEY", "CREDENTIAL", "CREDENTIAL_FILE"):
        # So that monkeypatch restores the variable after the test.
        monkeypatch.setenv(f"LATCHKEY_{name}", "")
    return tmp_path


@pytest.mark.parametrize("empty", [True, False], ids=["empty", "unset"])
@pytest.mark.parametrize("ca", [True, False], ids=["ca", "no ca"])
def test_page_connects_like_the_command_line(files: Path, empty: bool, ca: bool) -> None:
    """The console uses the same TLS and credential as the command line, despite empty variables."""
    if not empty:
        del os.environ["LATCHKEY_TLS_CA"]
    os.environ["LATCHKEY_CREDENTIAL"] = "not of use"
    given = files / "ca.pem" if ca else None
    access.choose(given, files / "own.pem", files / "own.key", files / "credential")
    access.hand_on("tokens.example.org:443")
    assert repr(Access.from_environment()) == repr(access.chosen())
    assert repr(access.chosen()) == "Access(TLS, with a credential)"
    assert os.environ["LATCHKEY_TLS_CA"] == (str(given) if given else "system")
