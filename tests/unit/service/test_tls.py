"""The files of the TLS listener: what is read of them, at the start and when they change."""

import codecs
import errno
import ssl
from pathlib import Path

import grpc
import pytest
import trustme
from latchkey_service import tls
from latchkey_service.tls import Certificates, TlsError
from structlog.testing import capture_logs

from tests.callers import ca_pem, write_server_files

# As the bundles of operating systems have it, in UTF-8 and in an older encoding.
COMMENTS = ["# Főtanúsítvány\n".encode(), b"# Autoridad de Certificaci\xf3n\n", codecs.BOM_UTF8]
OTHER = trustme.CA().cert_pem.bytes()


@pytest.fixture
def files(tmp_path):
    return write_server_files(tmp_path)


def certificates(files, **more):
    return Certificates(files["tls_certificate"], files["tls_key"], files["tls_client_ca"], **more)


@pytest.fixture
def fetch(files, monkeypatch):
    """What gRPC calls at each handshake, as it is made with the files; and a clock of its own."""
    now = [0.0]
    monkeypatch.setattr(grpc, "dynamic_ssl_server_credentials", lambda first, fetch, **_: fetch)
    return certificates(files, clock=lambda: now[0]).credentials(), now


@pytest.mark.parametrize("comment", COMMENTS)
def test_what_stands_around_certificates(files, comment):
    """Text of any encoding may stand before, between and after the CAs; lines end in any way."""
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
        (b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n", "has no certificates in PEM"),
        (ca_pem() + ca_pem().replace(b"MII", b"\xc3\xa9", 1), "a byte that is not ASCII"),
        (ca_pem() + ca_pem().replace(b"MII", b"AAA", 1), "has no certificates in PEM"),
        (ca_pem() + ca_pem().replace(b"MII", b"\0", 1), ""),
    ],
    # Certificates differ from process to process, and names of tests must not.
    ids=["empty", "indented", "nothing in it", "not ASCII", "no DER", "NUL"],
)
def test_what_is_wrong_with_a_bundle(files, text, reason):
    """It is told by the setting, the file, and the reason."""
    files["tls_client_ca"].write_bytes(text)
    path = files["tls_client_ca"]
    with pytest.raises(TlsError, match=rf"LATCHKEY_TLS_CLIENT_CA: {path}:? .*{reason}"):
        certificates(files).read()


@pytest.mark.parametrize("error", [ValueError("no"), TypeError("no")])
@pytest.mark.parametrize(
    ("call", "setting"),
    [("load_cert_chain", "TLS_KEY"), ("load_verify_locations", "TLS_CLIENT_CA")],
)
def test_whatever_the_library_raises(files, monkeypatch, call, setting, error):
    """It is told by the setting and the file, at the start."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(ssl.SSLContext, call, fail)
    path = files[setting.lower()]
    with pytest.raises(TlsError, match=f"LATCHKEY_{setting}: {path}: no"):
        certificates(files).read()


@pytest.mark.parametrize("comment", COMMENTS)
def test_a_bundle_that_changes(files, fetch, comment):
    """A changed bundle comes into force at the next handshake, once, whatever stands around the
    certificates in it."""
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
def test_a_bundle_that_is_broken_meanwhile(files, fetch, text):
    """It is told once, changes nothing, and the next one that is right comes into force."""
    fetched, _ = fetch
    files["tls_client_ca"].write_bytes(text)
    with capture_logs() as told:
        assert [fetched(), fetched()] == [None, None]
    assert [line["event"] for line in told] == ["certificates refused"]
    assert str(files["tls_client_ca"]) in told[0]["error"]
    files["tls_client_ca"].write_bytes(ca_pem() + OTHER)
    assert fetched() is not None


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "no"), RuntimeError("no")])
def test_reading_that_fails_by_itself(files, fetch, monkeypatch, error):
    """Whatever reading raises, no handshake fails of it; files that are right are read again after
    a while without a change, and not before."""
    fetched, now = fetch
    files["tls_client_ca"].write_bytes(ca_pem() + OTHER)
    with monkeypatch.context() as patch:

        def fail(*_, **__):
            raise error

        patch.setattr(Path, "open", fail)
        with capture_logs() as told:
            assert fetched() is None
        assert [line["event"] for line in told] == ["certificates refused"]
    now[0] += tls.RETRY_SECONDS - 1
    assert fetched() is None
    now[0] += 1
    assert fetched() is not None
    now[0] += 10 * tls.RETRY_SECONDS
    assert fetched() is None
