"""TLS files and bearer credential of a client.

    client = Client("tokens.example.org:443", access=Access(tls_ca="ca.pem", credential_file="c"))

Without `access`, a client reads environment variables. LATCHKEY_TLS_CA, LATCHKEY_TLS_CERTIFICATE
and LATCHKEY_TLS_KEY name files. LATCHKEY_CREDENTIAL is a credential, and LATCHKEY_CREDENTIAL_FILE
names a file that contains one. Everything is checked before a connection is made.
"""

import os
import re
import ssl
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Self

import grpc

from latchkey._shape import checksum
from latchkey.errors import AccessError
from latchkey.secret import Secret

__all__ = ["SYSTEM", "Access"]

PREFIX: Final = "LATCHKEY_"
SYSTEM: Final = "system"
"""A value of `tls_ca`: trust the CAs that gRPC trusts by default."""

Metadata = tuple[tuple[str, str], ...]

_CREDENTIAL: Final = re.compile(r"lkc_[0-9A-Za-z]{49}")
_CHECKSUM_LENGTH: Final = 6
# PEM blocks without the text around them, which has no meaning (RFC 7468 §2) and any encoding.
_BLOCKS: Final = re.compile(rb"-----BEGIN .*?-----END [^\n]*-----", re.DOTALL)
_SIZE_MAX: Final = 4 * 1024 * 1024
# How often a credential file is checked, so that a new credential is used without a restart.
_LOOK_AGAIN_SECONDS: Final = 1.0
_LOCAL: Final = re.compile(
    r"(unix:|unix-abstract:|vsock:|(dns:(//[^/]*/)?|ipv4:|ipv6:)?"
    r"(localhost|127\.\d+\.\d+\.\d+|\[::1\]|\[?::1\]?)(:\d+)?$)"
)


class Access:
    """TLS files and a credential, checked. Without arguments: plaintext, without a credential.

    Any TLS argument switches TLS on. `tls_ca` names the CAs that may have signed the service's
    certificate. If it is "system" or missing, gRPC's default CAs are trusted. The service accepts
    only TLS 1.3. gRPC has no option by which a client could insist on it. `tls_certificate` and
    `tls_key` are the client's own. `credential_file` is read again when it changes.

    Raises AccessError, which says what is wrong and what to do.
    """

    def __init__(
        self,
        *,
        tls_ca: str | os.PathLike[str] | None = None,
        tls_certificate: str | os.PathLike[str] | None = None,
        tls_key: str | os.PathLike[str] | None = None,
        credential: str | Secret | None = None,
        credential_file: str | os.PathLike[str] | None = None,
    ) -> None:
        if credential is not None and credential_file is not None:
            raise AccessError("credential and credential_file exclude each other: give only one")
        # Error reporters collect the local variables of a traceback, so none holds a credential.
        if isinstance(credential, str):
            credential = Secret(credential)
        # First, because error reporters also call repr().
        self._tls: grpc.ChannelCredentials | None = None
        self._credential: Secret | None = None
        self._tls = _Tls.read(tls_ca, tls_certificate, tls_key)
        self._file = None if credential_file is None else Path(credential_file)
        self._looked = time.monotonic()
        self._seen: object = None
        if credential is not None:
            self._credential = _checked(credential, "credential")
        elif self._file is not None:
            self._seen = _signature(self._file)
            self._credential = _read_credential(self._file)

    @classmethod
    def from_environment(
        cls,
        environment: Mapping[str, str] | None = None,
        *,
        tls_ca: str | os.PathLike[str] | None = None,
        tls_certificate: str | os.PathLike[str] | None = None,
        tls_key: str | os.PathLike[str] | None = None,
        credential_file: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Return the access that arguments and environment describe. Arguments take precedence.

        `environment` is that of the process by default. An empty variable counts as missing. In the
        environment only LATCHKEY_TLS_CA switches TLS on: on a machine that runs the service, the
        other two may be the service's own.
        """

        def given(name: str) -> str | None:
            # No argument has this as its default value, because help() would print all variables.
            variables = os.environ if environment is None else environment
            return variables.get(PREFIX + name) or None

        tls_ca = tls_ca or given("TLS_CA")
        if tls_ca is not None and tls_certificate is None and tls_key is None:
            tls_certificate, tls_key = given("TLS_CERTIFICATE"), given("TLS_KEY")
        credential = None
        if credential_file is None:
            if given("CREDENTIAL") is not None:
                credential = Secret(given("CREDENTIAL") or "")
            credential_file = given("CREDENTIAL_FILE")
        return cls(
            tls_ca=tls_ca,
            tls_certificate=tls_certificate,
            tls_key=tls_key,
            credential=credential,
            credential_file=credential_file,
        )

    def __repr__(self) -> str:
        who = "with a credential" if self._credential is not None else "without a credential"
        return f"Access({'TLS' if self._tls else 'plaintext'}, {who})"

    @property
    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """The credentials for a channel. None: plaintext."""
        return self._tls

    def check_target(self, target: str) -> None:
        """Raise AccessError if the credential would cross a network unencrypted."""
        if self._credential is not None and self._tls is None and not _LOCAL.match(target):
            raise AccessError(
                f"The credential would go to {target} unencrypted: give tls_ca ({PREFIX}TLS_CA) to "
                "use TLS"
            )

    def metadata(self) -> Metadata:
        """Return the metadata for each call. Checks a credential file at most once a second."""
        if self._file is not None and time.monotonic() - self._looked > _LOOK_AGAIN_SECONDS:
            self._looked = time.monotonic()
            if (seen := _signature(self._file)) != self._seen:
                self._seen = seen
                try:
                    self._credential = _read_credential(self._file)
                except AccessError:
                    # The file may be half written or being replaced, so keep the old credential.
                    # If that is no longer valid, the service says so.
                    self._seen = None
        if self._credential is None:
            return ()
        return (("authorization", f"Bearer {self._credential.reveal()}"),)


class _Tls:
    """Makes channel credentials from files."""

    @staticmethod
    def read(
        ca: str | os.PathLike[str] | None,
        certificate: str | os.PathLike[str] | None,
        key: str | os.PathLike[str] | None,
    ) -> grpc.ChannelCredentials | None:
        """Return the credentials, or None if no file is given. Raises AccessError."""
        if ca is None and certificate is None and key is None:
            return None
        if (certificate is None) != (key is None):
            missing = "tls_key" if key is None else "tls_certificate"
            raise AccessError(
                f"tls_certificate and tls_key belong together: give {missing}, too "
                f"({PREFIX}{missing.upper()})"
            )
        authorities = own = None
        if ca is not None and str(ca) != SYSTEM:
            # Pass gRPC the very bytes that were checked.
            authorities = b"\n".join(_BLOCKS.findall(_pem("tls_ca", Path(ca), "CERTIFICATE")))
            try:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.load_verify_locations(cadata=authorities.decode("ascii"))
            except (ssl.SSLError, TypeError, ValueError):
                raise AccessError(f"tls_ca: {ca} contains no readable certificate") from None
        if certificate is not None and key is not None:
            own = _pem("tls_certificate", Path(certificate), "CERTIFICATE")
            _pem("tls_key", Path(key), "PRIVATE KEY")
            _check_pair(Path(certificate), Path(key))
        # The key is read last, and no variable holds it.
        made: grpc.ChannelCredentials = grpc.ssl_channel_credentials(
            authorities, None if key is None else _pem("tls_key", Path(key), "PRIVATE KEY"), own
        )
        return made


def _check_pair(certificate: Path, key: Path) -> None:
    try:
        # Reject an encrypted key. `ssl` would otherwise ask for its password on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, key, _no_password)
    except ssl.SSLError as error:
        if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
            raise AccessError(f"tls_key: {key} does not belong to {certificate}") from None
        raise AccessError(
            f"tls_certificate, tls_key: {certificate} and {key} are not a certificate and its key"
        ) from None
    except OSError as error:
        raise AccessError(f"tls_key: {key}: {error.strerror}") from None


def _pem(name: str, path: Path, kind: str) -> bytes:
    """Read a file that must contain at least one PEM block of a kind."""
    data = _read(name, path)
    kinds = [block.decode() for block in re.findall(rb"-----BEGIN ([A-Z0-9 ]+)-----", data)]
    if any(found.endswith(kind) for found in kinds):
        return data
    # It may be a key in place of a certificate. See Access.__init__.
    del data
    if not kinds:
        raise AccessError(f"{name}: {path} is not a PEM file")
    raise AccessError(f"{name}: {path} contains no {kind.lower()}, but a {kinds[0].lower()}")


def _read(name: str, path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_SIZE_MAX + 1)
    except OSError as error:
        raise AccessError(f"{name}: {path}: {error.strerror}") from None
    if len(data) > _SIZE_MAX:
        raise AccessError(f"{name}: {path} is too large")
    return data


def _read_credential(path: Path) -> Secret:
    text = Secret(_read("credential_file", path).decode("utf-8", "replace").strip())
    return _checked(text, f"credential_file: {path}")


def _checked(credential: Secret, name: str) -> Secret:
    """Return a well-formed credential. Raises AccessError, which never shows it."""
    if not credential.reveal():
        raise AccessError(f"{name}: is empty")
    if not _is_credential(credential):
        raise AccessError(
            f"{name}: is not a credential, or is mistyped: it begins with lkc_ and has 53 "
            "characters, as 'latchkey policy new-caller' prints it"
        )
    return credential


def _is_credential(credential: Secret) -> bool:
    text, end = credential.reveal(), -_CHECKSUM_LENGTH
    return _CREDENTIAL.fullmatch(text) is not None and checksum(text[:end]) == text[end:]


def _signature(path: Path) -> object:
    try:
        status = path.stat()
    except OSError as error:
        return error.errno
    return (status.st_ino, status.st_mtime_ns, status.st_size)


def _no_password() -> str:
    raise OSError(0, "is encrypted: use a key without a password, in a file that only you can read")
