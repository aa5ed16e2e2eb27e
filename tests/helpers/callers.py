"""Callers for tests: a CA, valid and invalid certificates, credentials, and a policy with all
callers."""

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import grpc
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from latchkey_service.access.credentials import mint, policy_digest

PROXY = "spiffe://example.org/envoy"
ACCOUNT, OTHER_ACCOUNT = "acme", "globex"
# Name → role and accounts, None for all.
CALLERS: dict[str, tuple[str, list[str] | None]] = {
    "verifier": ("verifier", None),
    "manager": ("manager", None),
    "operator": ("operator", None),
    "revoker": ("revoker", None),
    "importer": ("importer", None),
    "acmes-verifier": ("verifier", [ACCOUNT]),
    "acmes-manager": ("manager", ["ac*"]),
    "acmes-operator": ("operator", [ACCOUNT]),
    "acmes-revoker": ("revoker", [ACCOUNT]),
    "acmes-importer": ("importer", [ACCOUNT]),
}


@cache
def credential(name: str) -> str:
    """Return the bearer credential of a caller of this name."""
    return mint(os.urandom).reveal()


def uri(name: str) -> str:
    return f"spiffe://example.org/{name}"


def policy_text(callers: Sequence[str] = tuple(CALLERS)) -> str:
    """Return a policy that allows these callers."""
    from latchkey_service.secret_format import Secret

    parts = []
    for name in callers:
        role, accounts = CALLERS[name]
        parts.append(
            f"[callers.{name}]\n"
            # This caller is identified by its DNS name only.
            f'certificates = ["{uri(name)}", "{name}.internal"]\n'
            f'credentials = ["{policy_digest(Secret(credential(name)))}"]\n'
            f'roles = ["{role}"]\n'
        )
        if accounts is not None:
            parts.append(f"accounts = {accounts}\n")
    return "\n".join(parts)


@dataclass(frozen=True)
class Identity:
    """A certificate with its key, PEM."""

    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)


@cache
def authority() -> trustme.CA:
    return trustme.CA()


def ca_pem() -> bytes:
    pem: bytes = authority().cert_pem.bytes()
    return pem


@cache
def server_identity() -> Identity:
    return _issued(authority().issue_cert("localhost", "127.0.0.1"))


def dns_identity(*names: str) -> Identity:
    """A client's certificate with DNS names."""
    return _issued(authority().issue_cert(*names))


def stranger(*names: str) -> Identity:
    """The same from an unknown CA."""
    return _issued(trustme.CA().issue_cert(*names))


def _issued(leaf: trustme.LeafCert) -> Identity:
    chain = b"".join(pem.bytes() for pem in leaf.cert_chain_pems)
    return Identity(chain, leaf.private_key_pem.bytes())


def made(
    names: Sequence[x509.GeneralName],
    *,
    expired: bool = False,
    signed_by: trustme.CA | None = None,
    more: Sequence[x509.ExtensionType] = (),
) -> Identity:
    """A client's certificate with arbitrary alternative names, which trustme does not create."""
    ca = signed_by or authority()
    signer = serialization.load_pem_private_key(ca.private_key_pem.bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    issuer = x509.load_pem_x509_certificate(ca.cert_pem.bytes())
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 2 * day)
        .not_valid_after(now - day if expired else now + day)
        .add_extension(x509.SubjectAlternativeName(names), critical=True)
    )
    for extension in more:
        builder = builder.add_extension(extension, critical=False)
    certificate = builder.sign(signer, hashes.SHA256())
    return Identity(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


def spiffe_identity(*uris: str, expired: bool = False) -> Identity:
    """A client's certificate with URIs."""
    return made([x509.UniformResourceIdentifier(uri) for uri in uris], expired=expired)


def channel_credentials(identity: Identity | None) -> grpc.ChannelCredentials:
    """The credentials of a client's TLS connection."""
    if identity is None:
        return grpc.ssl_channel_credentials(ca_pem())
    return grpc.ssl_channel_credentials(ca_pem(), identity.key, identity.certificate)


def write_server_files(folder: Path) -> dict[str, Path]:
    """Write the files that a TLS listener needs; return the settings that name them."""
    identity = server_identity()
    files = {
        "tls_certificate": (folder / "server.pem", identity.certificate),
        "tls_key": (folder / "server.key", identity.key),
        "tls_client_ca": (folder / "clients.pem", ca_pem()),
    }
    for path, data in files.values():
        path.write_bytes(data)
    files["tls_key"][0].chmod(0o600)
    return {name: path for name, (path, _) in files.items()}
