"""`latchkey dev-ca`: a certificate authority for trying TLS, with certificates for both sides.

Its key is thrown away, so nobody can issue further certificates. It is not for production.
"""

import argparse
import datetime
import ipaddress
import os
import shlex
import sys
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from latchkey_service.access.policy import is_name

__all__ = ["run"]

DAYS: Final = 30
# A certificate is valid a little before it is made, for machines whose clocks differ.
EARLY: Final = datetime.timedelta(minutes=5)
FILES: Final = ("ca.pem", "server.pem", "server.key", "client.pem", "client.key")
SPIFFE: Final = "spiffe://latchkey.dev-ca/"


def run(arguments: list[str]) -> int:
    """Write the files and print how to use them. Return the exit code."""
    parser = argparse.ArgumentParser(
        prog="latchkey dev-ca",
        description="Write a CA and certificates for trying TLS, not for production.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, default=Path("dev-ca"), metavar="FOLDER")
    parser.add_argument("--host", action="append", default=[], metavar="NAME")
    parser.add_argument("--caller", default="me", metavar="NAME")
    given = parser.parse_args(arguments)
    if not is_name(given.caller):
        parser.error("a caller name has 1-64 characters of A-Za-z0-9._-")
    hosts = given.host or ["localhost", "127.0.0.1", "::1"]
    folder: Path = given.output
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, content in zip(FILES, _contents(hosts, given.caller), strict=True):
            # Never replaces a file: a server may be using it.
            mode = 0o600 if name.endswith(".key") else 0o644
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with os.fdopen(os.open(folder / name, flags, mode), "wb") as file:
                file.write(content)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        sys.stderr.write(f"latchkey: cannot write {error.filename}: {error.strerror}\n")
        return 1
    sys.stdout.write(_instructions(folder, given.caller))
    return 0


def _contents(hosts: list[str], caller: str) -> list[bytes]:
    """Return the contents of FILES. Raises ValueError for a host that no certificate can name."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Latchkey development CA")])
    authority = (
        _certificate(name, name, key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    contents = [authority.public_bytes(serialization.Encoding.PEM)]
    for names, usage in (
        ([_host(host) for host in hosts], ExtendedKeyUsageOID.SERVER_AUTH),
        ([x509.UniformResourceIdentifier(SPIFFE + caller)], ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        own = ec.generate_private_key(ec.SECP256R1())
        issued = (
            _certificate(x509.Name([]), name, own)
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .sign(key, hashes.SHA256())
        )
        contents += [
            issued.public_bytes(serialization.Encoding.PEM),
            own.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        ]
    return contents


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLY)
        .not_valid_after(now + datetime.timedelta(days=DAYS))
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _instructions(folder: Path, caller: str) -> str:
    path = shlex.quote(str(folder))
    return f"""\
{folder} contains a CA and certificates, valid for {DAYS} days. They are for trying TLS, not for
production.

The service, in its environment:
  LATCHKEY_TLS_LISTEN=127.0.0.1:50052
  LATCHKEY_TLS_CERTIFICATE={path}/server.pem
  LATCHKEY_TLS_KEY={path}/server.key
  LATCHKEY_TLS_CLIENT_CA={path}/ca.pem

In its policy file:
  [callers.{caller if "." not in caller else f'"{caller}"'}]
  certificates = ["{SPIFFE}{caller}"]
  roles = ["manager", "verifier"]

A caller:
  latchkey list -a acme --target localhost:50052 --tls-ca {path}/ca.pem \\
    --tls-certificate {path}/client.pem --tls-key {path}/client.key
"""
