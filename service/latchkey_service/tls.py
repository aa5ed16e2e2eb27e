"""TLS of the listener beside the plaintext one: 1.3 only, files read again when they change.

A connection keeps the certificate that it began with, so that a change drops none. Files that do
not go together are told in the log, and the ones before stay.
"""

import os
import ssl
import threading
from pathlib import Path
from typing import Final

import grpc

from latchkey_service.log import logger

__all__ = ["Certificates", "TlsError", "allow_only_tls_1_3"]

# Of a certificate chain with its key, and of CAs; a system's whole store of CAs is smaller.
SIZE_MAX: Final = 4 * 1024 * 1024


class TlsError(Exception):
    """A file is not what TLS needs. The message names the setting and the reason."""


def allow_only_tls_1_3() -> None:
    """Make this process's gRPC refuse TLS 1.2. To be called before any gRPC object exists.

    grpcio (1.75) has no setting for the version. Its setting for ciphers is for TLS 1.2 alone, and
    the only one named here needs a key that was shared before, which nobody has.
    """
    os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-PSK-AES128-CBC-SHA"


class Certificates:
    """Certificate, key and, with `client_ca`, the CAs of the clients' certificates."""

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._certificate = certificate
        self._key = key
        self._client_ca = client_ca
        # Asked for from gRPC's threads, at each handshake.
        self._lock = threading.Lock()
        self._seen: object = None

    def credentials(self) -> grpc.ServerCredentials:
        """Return what a listener is made with. Raises TlsError."""
        self._seen = self._signature()
        made: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            self.read(),
            self._changed,  # type: ignore[arg-type]  # None is for "as before"
            require_client_authentication=self._client_ca is not None,
        )
        return made

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Read and check the files. Raises TlsError."""
        certificate = _pem("LATCHKEY_TLS_CERTIFICATE", self._certificate)
        key = _pem("LATCHKEY_TLS_KEY", self._key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # A password is refused, instead of asked for on the terminal.
            context.load_cert_chain(self._certificate, self._key, password=_no_password)
        except ssl.SSLError as error:
            reason = {
                "KEY_VALUES_MISMATCH": "is not the key of LATCHKEY_TLS_CERTIFICATE",
                "KEY_TYPE_MISMATCH": "is not the key of LATCHKEY_TLS_CERTIFICATE",
            }.get(error.reason or "", "and LATCHKEY_TLS_CERTIFICATE are not a key and its chain")
            raise TlsError(f"LATCHKEY_TLS_KEY: {self._key} {reason}") from None
        except OSError as error:
            raise TlsError(f"LATCHKEY_TLS_KEY: {self._key}: {error.strerror}") from None
        authorities = None
        if self._client_ca is not None:
            authorities = _pem("LATCHKEY_TLS_CLIENT_CA", self._client_ca)
            try:
                context.load_verify_locations(cadata=authorities.decode("ascii", "replace"))
            except ssl.SSLError:
                raise TlsError(
                    f"LATCHKEY_TLS_CLIENT_CA: {self._client_ca} has no certificates in PEM"
                ) from None
        made: grpc.ServerCertificateConfiguration = grpc.ssl_server_certificate_configuration(
            [(key, certificate)], root_certificates=authorities
        )
        return made

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what to use from now on if the files have changed, else None. Never fails."""
        with self._lock:
            seen = self._signature()
            if seen == self._seen:
                return None
            # Also when it is refused: that is told once, and not at each handshake.
            self._seen = seen
        try:
            configuration = self.read()
        except TlsError as error:
            logger().error("certificates refused", error=str(error))
            return None
        logger().info("certificates in force", certificate=str(self._certificate))
        return configuration

    def _signature(self) -> object:
        found: list[object] = []
        for path in (self._certificate, self._key, self._client_ca):
            try:
                status = None if path is None else path.stat()
            except OSError as error:
                found.append(error.errno)
            else:
                found.append(status and (status.st_ino, status.st_mtime_ns, status.st_size))
        return tuple(found)


def _pem(name: str, path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_MAX + 1)
    except OSError as error:
        raise TlsError(f"{name}: {path}: {error.strerror}") from None
    if b"-----BEGIN " not in data or len(data) > SIZE_MAX:
        raise TlsError(f"{name}: {path} is not a PEM file")
    return data


def _no_password() -> str:
    raise OSError(0, "is encrypted: give a key without a password, readable by Latchkey alone")
