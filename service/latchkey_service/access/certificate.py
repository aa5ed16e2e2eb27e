r"""A client certificate's alternative names, as they stand in it (RFC 5280 §4.2.1.6), and its end.

They are read from the certificate itself, since what others hand on may be another name: grpcio's
end at a NUL, so that `shop.internal\0.evil.example` would be `shop.internal`. Whether the
certificate is good, TLS has seen before, and is nothing to this module; but it may have ended since
then, as neither an open connection nor one that resumes a session looks again. Pure.
"""

from typing import NamedTuple

from cryptography import x509

__all__ = ["Certificate", "CertificateError", "read_certificate"]


class CertificateError(ValueError):
    """It is no certificate, or has names that are none. Carries nothing of it."""


class Certificate(NamedTuple):
    """The names of a certificate that callers are known by, and when it ends, in POSIX seconds."""

    uris: tuple[str, ...]
    dns: tuple[str, ...]
    ends_at: float


def read_certificate(pem: str) -> Certificate:
    """Return what a certificate says. Raises CertificateError."""
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode("ascii"))
        ends_at = certificate.not_valid_after_utc.timestamp()
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = found.get_values_for_type(x509.UniformResourceIdentifier)
        dns = found.get_values_for_type(x509.DNSName)
    except x509.ExtensionNotFound:
        return Certificate((), (), ends_at)
    except Exception:  # noqa: BLE001 - whatever the library makes of it, it names nobody
        raise CertificateError from None
    # What is not printable, such as a NUL, is none.
    if not all(name.isprintable() for name in (*uris, *dns)):
        raise CertificateError
    return Certificate(tuple(uris), tuple(dns), ends_at)
