"""TLS of the listener beside the plaintext one: 1.3 only, files read again when they change.

A connection keeps the certificate that it began with, so that a change drops none. Files that do
not go together are told in the log, and the ones before stay.
"""

import codecs
import math
import os
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import grpc

from latchkey_service.log import logger

__all__ = ["Certificates", "TlsError", "allow_only_tls_1_3"]

# Of a certificate chain with its key, and of CAs; a system's whole store of CAs is smaller.
SIZE_MAX: Final = 4 * 1024 * 1024
# After which files that were refused are read again unchanged: it may have been for want of a file
# descriptor. Not at each handshake, which anybody can begin: a refusal is a line in the log.
RETRY_SECONDS: Final = 60.0


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

    def __init__(
        self,
        certificate: Path,
        key: Path,
        client_ca: Path | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._certificate = certificate
        self._key = key
        self._client_ca = client_ca
        self._clock = clock
        # Asked for from gRPC's threads, at each handshake.
        self._lock = threading.Lock()
        self._seen: object = None
        self._retry_time = math.inf

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
        except (TypeError, ValueError) as error:
            raise TlsError(f"LATCHKEY_TLS_KEY: {self._key}: {error}") from None
        authorities = None
        if self._client_ca is not None:
            # gRPC is given what was checked.
            authorities = _blocks(_pem("LATCHKEY_TLS_CLIENT_CA", self._client_ca))
            try:
                context.load_verify_locations(cadata=authorities.decode("ascii"))
            except ssl.SSLError:
                raise TlsError(
                    f"LATCHKEY_TLS_CLIENT_CA: {self._client_ca} has no certificates in PEM"
                ) from None
            except UnicodeDecodeError:
                raise TlsError(
                    f"LATCHKEY_TLS_CLIENT_CA: {self._client_ca} has a certificate in PEM with a "
                    "byte that is not ASCII"
                ) from None
            except (TypeError, ValueError) as error:
                raise TlsError(f"LATCHKEY_TLS_CLIENT_CA: {self._client_ca}: {error}") from None
        made: grpc.ServerCertificateConfiguration = grpc.ssl_server_certificate_configuration(
            [(key, certificate)], root_certificates=authorities
        )
        return made

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what to use from now on if the files have changed, else None. Never fails."""
        try:
            return self._read_again()
        except TlsError as error:
            logger().error("certificates refused", error=str(error))
        except Exception as error:  # noqa: BLE001 - gRPC would drop it without a line in the log
            logger().error("certificates refused", error=repr(error))
        return None

    def _read_again(self) -> grpc.ServerCertificateConfiguration | None:
        with self._lock:
            seen, now = self._signature(), self._clock()
            if seen == self._seen and now < self._retry_time:
                return None
            # Before it is known whether they go together: one of the handshakes at once is enough.
            self._seen, self._retry_time = seen, now + RETRY_SECONDS
        configuration = self.read()
        with self._lock:
            if seen != self._seen:
                # Another handshake has found newer ones meanwhile.
                return None
            self._retry_time = math.inf
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


def _blocks(data: bytes) -> bytes:
    """Return the PEM blocks of a file without what stands around them, in whatever encoding.

    RFC 7468 §2: such text may be there, and means nothing.
    """
    lines = []
    inside = False
    for line in data.removeprefix(codecs.BOM_UTF8).splitlines():
        inside = inside or line.startswith(b"-----BEGIN ")
        if inside:
            lines.append(line)
        inside = inside and not line.startswith(b"-----END ")
    return b"\n".join([*lines, b""])


def _no_password() -> str:
    raise OSError(0, "is encrypted: give a key without a password, readable by Latchkey alone")
