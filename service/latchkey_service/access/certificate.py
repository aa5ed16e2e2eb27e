r"""Subject alternative names (RFC 5280 §4.2.1.6) and the expiry of a client certificate.

This module reads the names from the certificate itself, because other layers may alter them: grpcio
cuts a name at a NUL, which turns `shop.internal\0.evil.example` into `shop.internal`. TLS has
already verified the certificate; this module does not. But the certificate may have expired since
then, because TLS checks neither open connections nor resumed sessions again. Pure.
"""

from typing import NamedTuple

__all__ = ["Certificate", "CertificateError", "read_certificate"]


class CertificateError(ValueError):
    """The data is not a certificate, or contains an invalid name. The message quotes no part of
    it.
    """


class Certificate(NamedTuple):
    """The names that identify callers, and the expiry in POSIX seconds."""

    uris: tuple[str, ...]
    dns: tuple[str, ...]
    ends_at: float


def read_certificate(pem: str) -> Certificate:
    """Parse a PEM certificate. Raises CertificateError."""
    # Imported here for the same reason as in `tls.py`, which imported it when the listener started.
    from cryptography import x509  # noqa: PLC0415

    try:
        certificate = x509.load_pem_x509_certificate(pem.encode("ascii"))
        ends_at = certificate.not_valid_after_utc.timestamp()
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = found.get_values_for_type(x509.UniformResourceIdentifier)
        dns = found.get_values_for_type(x509.DNSName)
    except x509.ExtensionNotFound:
        return Certificate((), (), ends_at)
    except Exception:  # noqa: BLE001 - a certificate that does not parse identifies nobody
        raise CertificateError from None
    # A name with unprintable characters, such as a NUL, is invalid.
    if not all(name.isprintable() for name in (*uris, *dns)):
        raise CertificateError
    return Certificate(tuple(uris), tuple(dns), ends_at)
