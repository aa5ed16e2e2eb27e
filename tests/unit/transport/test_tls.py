"""The files of the TLS listener: validation at startup, and reloads."""

import codecs
import errno
import ssl
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
import trustme
from latchkey_service.transport import tls
from latchkey_service.transport.tls import Certificates, TlsError
from structlog.testing import capture_logs

from tests.helpers.callers import ca_pem, write_server_files

# Comments as in the CA bundles of operating systems, in UTF-8 and in an older encoding.
COMMENTS = ["# Főtanúsítvány\n".encode(), b"# Autoridad de Certificaci\xf3n\n", codecs.BOM_UTF8]
OTHER = trustme.CA().cert_pem.bytes()


@pytest.fixture
def files(tmp_path):
    return write_server_files(tmp_path)


def certificates(files, **more):
    return Certificates(files["tls_certificate"], files["tls_key"], files["tls_client_ca"], **more)


@pytest.fixture
def fetch(files, monkeypatch):
    """The function that gRPC calls at each handshake, and the clock that it uses."""
    now = [0.0]
    monkeypatch.setattr(grpc, "dynamic_ssl_server_credentials", lambda first, fetch, **_: fetch)
    return certificates(files, clock=lambda: now[0]).credentials(), now


@pytest.mark.parametrize("comment", COMMENTS)
def test_text_around_certificates_is_ignored(files, comment):
    """Text in any encoding may surround the CA certificates, and any kind of newline works."""
    for text in (
        comment + ca_pem(),
        comment + ca_pem() + b"\n" + comment.removeprefix(codecs.BOM_UTF8) + OTHER + b"\xff",
        comment + ca_pem().replace(b"\n", b"\r\n"),
    ):
        files["tls_client_ca"].write_bytes(text)
        assert certificates(files).read() is not None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "is not a PEM file"),
        (b"# " + ca_pem(), "Empty certificate data"),
        (b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n", "contains no PEM cert"),
        (ca_pem() + ca_pem().replace(b"MII", b"\xc3\xa9", 1), "a byte that is not ASCII"),
        (ca_pem() + ca_pem().replace(b"MII", b"AAA", 1), "contains no PEM certificates"),
        (ca_pem() + ca_pem().replace(b"MII", b"\0", 1), ""),
    ],
    # Certificates differ between processes, but test ids must not.
    ids=["empty", "indented", "nothing in it", "not ASCII", "no DER", "NUL"],
)
def test_invalid_bundle(files, text, reason):
    """The error names the setting, the file and the reason."""
    files["tls_client_ca"].write_bytes(text)
    path = files["tls_client_ca"]
    with pytest.raises(TlsError, match=rf"LATCHKEY_TLS_CLIENT_CA: {path}:? .*{reason}"):
        certificates(files).read()


@pytest.mark.parametrize("error", [ValueError("no"), TypeError("no")])
@pytest.mark.parametrize(
    ("call", "setting"),
    [("load_cert_chain", "TLS_KEY"), ("load_verify_locations", "TLS_CLIENT_CA")],
)
def test_any_exception_of_the_library(files, monkeypatch, call, setting, error):
    """At startup, the error names the setting and the file."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(ssl.SSLContext, call, fail)
    path = files[setting.lower()]
    with pytest.raises(TlsError, match=f"LATCHKEY_{setting}: {path}: no"):
        certificates(files).read()


@pytest.mark.parametrize("comment", COMMENTS)
def test_changed_bundle(files, fetch, comment):
    """The next handshake uses a changed bundle, whatever text surrounds its certificates. Later
    handshakes do not read it again."""
    fetched, _ = fetch
    assert fetched() is None
    files["tls_client_ca"].write_bytes(comment + ca_pem() + OTHER)
    assert fetched() is not None
    assert fetched() is None


@pytest.mark.parametrize(
    "text",
    [b"", b"\xff", ca_pem().replace(b"MII", b"\xc3\xa9", 1), ca_pem().replace(b"MII", b"\0", 1)],
    ids=["empty", "no text", "not ASCII", "NUL"],
)
def test_bundle_that_becomes_invalid(files, fetch, text):
    """An invalid bundle is logged once and changes nothing. The next valid one is used."""
    fetched, _ = fetch
    files["tls_client_ca"].write_bytes(text)
    with capture_logs() as lines:
        assert [fetched(), fetched()] == [None, None]
    assert [line["event"] for line in lines] == ["certificates rejected"]
    assert str(files["tls_client_ca"]) in lines[0]["error"]
    files["tls_client_ca"].write_bytes(ca_pem() + OTHER)
    assert fetched() is not None


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "no"), RuntimeError("no")])
def test_exception_while_reading(files, fetch, monkeypatch, error):
    """No exception while reading makes a handshake fail. Unchanged files are read again after a
    delay, and not before."""
    fetched, now = fetch
    files["tls_client_ca"].write_bytes(ca_pem() + OTHER)
    with monkeypatch.context() as patch:

        def fail(*_, **__):
            raise error

        patch.setattr(Path, "open", fail)
        with capture_logs() as lines:
            assert fetched() is None
        assert [line["event"] for line in lines] == ["certificates rejected"]
    now[0] += tls.RETRY_SECONDS - 1
    assert fetched() is None
    now[0] += 1
    assert fetched() is not None
    now[0] += 10 * tls.RETRY_SECONDS
    assert fetched() is None


def test_a_worker_that_would_accept_tls_1_2_does_not_start(monkeypatch):
    """A worker without our variables refuses to serve TLS."""
    (name,) = tls.ENVIRONMENT
    for value in ("", "ECDHE-ECDSA-AES128-GCM-SHA256"):
        monkeypatch.setenv(name, value)
        with pytest.raises(TlsError, match=name):
            tls.check_only_tls_1_3()
    monkeypatch.setenv(name, tls.ENVIRONMENT[name])
    tls.check_only_tls_1_3()


def test_a_start_without_tls_loads_no_x509() -> None:
    """The supervisor and the workers import the X.509 library only for a TLS listener."""
    code = (
        "import sys, latchkey_service.process.supervisor, latchkey_service.process.worker\n"
        "assert 'cryptography.x509' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
