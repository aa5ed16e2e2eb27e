"""TLS 1.3 of the listener beside the plaintext one. Reloads the files when they change.

A change drops no connection: each keeps the certificate that it began with. If the new files do not
match, the error is logged and the old ones stay in use.
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

from latchkey_service.settings.file_access import CERTIFICATE, TLS_KEY, Rule, refusal
from latchkey_service.settings.logs import logger

__all__ = ["ENVIRONMENT", "Certificates", "TlsError", "check_only_tls_1_3"]

# For a certificate chain, key or CA file. A system's whole CA bundle is smaller.
SIZE_MAX: Final = 4 * 1024 * 1024
# Delay before rejected files are read again although they are unchanged: the cause may have been a
# lack of file descriptors. Not at each handshake: anyone can start one, and a rejection is logged.
RETRY_SECONDS: Final = 60.0
# The variables that make gRPC reject TLS 1.2. gRPC reads them once, when Python imports it, so they
# must be in the environment of a process before it starts.
# grpcio (1.75) has no setting for the TLS version. Its cipher setting affects only TLS 1.2, and the
# only cipher named here requires a pre-shared key, which nobody has.
ENVIRONMENT: Final = {"GRPC_SSL_CIPHER_SUITES": "ECDHE-PSK-AES128-CBC-SHA"}


class TlsError(Exception):
    """A TLS file is invalid. The message names the setting and the reason."""


def check_only_tls_1_3() -> None:
    """Raise TlsError unless this process was started with ENVIRONMENT."""
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        raise TlsError(
            "LATCHKEY_TLS_LISTEN: this worker would accept TLS 1.2, because its environment lacks "
            f"{' and '.join(ENVIRONMENT)}"
        )


class Certificates:
    """Certificate, key and, with `client_ca`, the CAs that sign client certificates."""

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
        # gRPC's threads call us at each handshake.
        self._lock = threading.Lock()
        self.expiry_unix_seconds: float | None = None
        """When the server's certificate in use expires, or one of its intermediate certificates."""
        self._seen: object = None
        self._retry_time = math.inf

    def credentials(self) -> grpc.ServerCredentials:
        """Return the credentials of a listener. Raises TlsError."""
        self._seen = self._signature()
        made: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            self.read(),
            self._changed,  # type: ignore[arg-type]  # None means unchanged
            require_client_authentication=self._client_ca is not None,
        )
        return made

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Read and check the files. Raises TlsError."""
        certificate = _pem("LATCHKEY_TLS_CERTIFICATE", self._certificate)
        key = _pem("LATCHKEY_TLS_KEY", self._key, TLS_KEY)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # Reject an encrypted key instead of prompting for its password on the terminal.
            context.load_cert_chain(self._certificate, self._key, password=_no_password)
        except ssl.SSLError as error:
            reason = {
                "KEY_VALUES_MISMATCH": "is not the key of LATCHKEY_TLS_CERTIFICATE",
                "KEY_TYPE_MISMATCH": "is not the key of LATCHKEY_TLS_CERTIFICATE",
            }.get(error.reason or "", "does not match the chain in LATCHKEY_TLS_CERTIFICATE")
            raise TlsError(f"LATCHKEY_TLS_KEY: {self._key} {reason}") from None
        except OSError as error:
            raise TlsError(f"LATCHKEY_TLS_KEY: {self._key}: {error.strerror}") from None
        except (TypeError, ValueError) as error:
            raise TlsError(f"LATCHKEY_TLS_KEY: {self._key}: {error}") from None
        authorities = None
        if self._client_ca is not None:
            # gRPC must get exactly the bytes that are checked here.
            authorities = _blocks(_pem("LATCHKEY_TLS_CLIENT_CA", self._client_ca))
            try:
                context.load_verify_locations(cadata=authorities.decode("ascii"))
            except ssl.SSLError:
                raise TlsError(
                    f"LATCHKEY_TLS_CLIENT_CA: {self._client_ca} contains no PEM certificates"
                ) from None
            except UnicodeDecodeError:
                raise TlsError(
                    f"LATCHKEY_TLS_CLIENT_CA: {self._client_ca} contains a PEM certificate with a "
                    "byte that is not ASCII"
                ) from None
            except (TypeError, ValueError) as error:
                raise TlsError(f"LATCHKEY_TLS_CLIENT_CA: {self._client_ca}: {error}") from None
        made: grpc.ServerCertificateConfiguration = grpc.ssl_server_certificate_configuration(
            [(key, certificate)], root_certificates=authorities
        )
        self.expiry_unix_seconds = _earliest_expiry(certificate)
        return made

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the new configuration if the files have changed, else None. Never raises."""
        try:
            return self._read_again()
        except TlsError as error:
            logger().error("certificates rejected", error=str(error))
        except Exception as error:  # noqa: BLE001 - gRPC would swallow it without a log line
            logger().error("certificates rejected", error=repr(error))
        return None

    def _read_again(self) -> grpc.ServerCertificateConfiguration | None:
        with self._lock:
            seen, now = self._signature(), self._clock()
            if seen == self._seen and now < self._retry_time:
                return None
            # Set before the files are checked, so that only one of several handshakes checks them.
            self._seen, self._retry_time = seen, now + RETRY_SECONDS
        configuration = self.read()
        with self._lock:
            if seen != self._seen:
                # Meanwhile, another handshake found newer files.
                return None
            self._retry_time = math.inf
        logger().info("certificates reloaded", certificate=str(self._certificate))
        return configuration

    def _signature(self) -> object:
        found: list[object] = []
        for path in (self._certificate, self._key, self._client_ca):
            try:
                status = None if path is None else path.stat()
            except OSError as error:
                found.append(error.errno)
            else:
                # The change time as well: owner and mode count.
                times = status and (status.st_mtime_ns, status.st_ctime_ns)
                found.append(status and (status.st_ino, times, status.st_size))
        return tuple(found)


def _pem(name: str, path: Path, rule: Rule = CERTIFICATE) -> bytes:
    try:
        with path.open("rb") as file:
            problem = refusal(path, os.fstat(file.fileno()), rule)
            data = file.read(SIZE_MAX + 1)
    except OSError as error:
        raise TlsError(f"{name}: {path}: {error.strerror}") from None
    if problem is not None:
        raise TlsError(f"{name}: {problem}")
    if b"-----BEGIN " not in data or len(data) > SIZE_MAX:
        raise TlsError(f"{name}: {path} is not a PEM file")
    return data


def _blocks(data: bytes) -> bytes:
    """Return the PEM blocks of a file without the text around them, which may have any encoding.

    RFC 7468 §2: such text is allowed and has no meaning.
    """
    lines = []
    inside = False
    for line in data.removeprefix(codecs.BOM_UTF8).splitlines():
        inside = inside or line.startswith(b"-----BEGIN ")
        if inside:
            lines.append(line)
        inside = inside and not line.startswith(b"-----END ")
    return b"\n".join([*lines, b""])


def _earliest_expiry(chain: bytes) -> float | None:
    """Return when the first certificate of a PEM chain expires, or None if that is unknown."""
    # Importing it takes 6 % of the processor time of a start. Most services have no TLS listener.
    from cryptography import x509  # noqa: PLC0415

    try:
        certificates = x509.load_pem_x509_certificates(chain)
        return min(each.not_valid_after_utc.timestamp() for each in certificates)
    except ValueError:
        # OpenSSL accepts some certificates that this parser rejects.
        return None


def _no_password() -> str:
    raise OSError(0, "is encrypted: use a key without a password that only Latchkey can read")
