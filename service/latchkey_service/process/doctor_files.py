"""Checks of `latchkey doctor` that need files only: policy, certificates, peppers, secrets."""

import itertools
import ssl
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509

from latchkey_service.access.policy import PolicyError, parse
from latchkey_service.access.policy_file import read_text
from latchkey_service.process.finding import Finding, failure, ok, skipped, split, warning
from latchkey_service.settings.loading import file_warnings
from latchkey_service.settings.settings import PREFIX, Settings
from latchkey_service.settings.webhook_secrets import WebhookError, read_secrets
from latchkey_service.tokens import pepper_file
from latchkey_service.tokens.pepper_file import PepperFileError, PepperFileMissing
from latchkey_service.transport import tls

__all__ = ["certificate_findings", "file_findings", "pepper_finding", "policy_finding"]

# Time to get a new certificate by hand, with a weekend in between.
EXPIRY_WARNING: Final = timedelta(days=14)
# A handshake in memory takes four steps; a failed one ends earlier.
STEPS_MAX: Final = 10
_ANY: Final = ("0.0.0.0", "::", "")  # noqa: S104 - not bound


def file_findings(settings: Settings) -> list[Finding]:
    """Check owners and modes of the files that may be used nevertheless, and the webhook's file."""
    found = [split(warning, "files", text) for text in file_warnings(settings)]
    if not found:
        found = [ok("files", "owners and modes are correct")]
    if settings.webhook_secret_file is not None:
        try:
            read_secrets(settings.webhook_secret_file)
        except WebhookError as error:
            found.append(failure("webhook", str(error), f"repair {PREFIX}WEBHOOK_SECRET_FILE"))
        else:
            found.append(ok("webhook", "the secrets that sign events can be read"))
    return found


def policy_finding(settings: Settings) -> Finding:
    """Check the policy file."""
    if settings.policy is None:
        return ok("policy", "no policy: everyone who reaches this service may do everything")
    try:
        policy = parse(read_text(settings.policy))
    except PolicyError as error:
        return failure(
            "policy",
            f"{settings.policy}: {error}",
            "correct the file; a running service keeps the policy that it has",
        )
    return ok("policy", f"{settings.policy} names {len(policy.callers)} callers")


def pepper_finding(settings: Settings) -> tuple[Finding, list[str] | None]:
    """Check the pepper file. Return the ids of its peppers too, or None if it cannot be used.

    A missing file that the service would generate has no peppers.
    """
    path = settings.pepper_path
    try:
        keyring = pepper_file.load(path)
    except PepperFileMissing as error:
        if settings.pepper_file is None:
            return ok("peppers", f"{path} does not exist yet"), []
        text = f"point {PREFIX}PEPPER_FILE to a copy of the file of another host"
        return failure("peppers", str(error), text), None
    except PepperFileError as error:
        return split(failure, "peppers", str(error)), None
    ids = [pepper.id for pepper in keyring.peppers]
    return ok("peppers", f"{path} has {', '.join(ids)}"), ids


def certificate_findings(
    settings: Settings, now: datetime, host: str | None, ca: Path | None
) -> list[Finding]:
    """Check the certificates of the TLS listener: files, chain, name and end.

    `host` is the name that clients use, `ca` a file with the CAs that they trust.
    """
    check = "certificate"
    if settings.tls_listen is None:
        return [skipped(check, f"{PREFIX}TLS_LISTEN is not set")]
    certificate, key = settings.tls_certificate, settings.tls_key
    if certificate is None or key is None:
        return [skipped(check, "see settings")]
    try:
        tls.Certificates(certificate, key, settings.tls_client_ca).read()
        chain = x509.load_pem_x509_certificates(certificate.read_bytes())
    except ValueError as error:
        return [skipped(check, f"{certificate}: name and end cannot be read: {error}")]
    except (tls.TlsError, OSError) as error:
        return [failure(check, str(error), "correct the file; no service starts with it")]
    found = [*_ends(check, certificate, chain, now), *_order(check, certificate, chain)]
    if settings.tls_client_ca is not None:
        found += _authorities(settings.tls_client_ca, now)
    listening = settings.tls_listen.rpartition(":")[0].strip("[]")
    name = host or (None if listening in _ANY else listening)
    if any(finding.state == "failure" for finding in found):
        # A handshake would only repeat that.
        return found
    if (problem := _handshake(certificate, key, ca, name)) is not None:
        remedy = "get a certificate for the name that clients use, or name it with --host"
        found.append(failure(check, f"{certificate}: {problem}", remedy))
    elif name is not None:
        trusted = "" if ca is None else f", and {ca} leads to it"
        found.append(ok(check, f"{certificate} is valid for {name}{trusted}"))
    else:
        names = ", ".join(_names(chain[0])) or "no name"
        found.append(ok(check, f"{certificate} is for {names}; --host NAME checks one"))
    return found


def _authorities(path: Path, now: datetime) -> list[Finding]:
    check = "client CA"
    try:
        authorities = x509.load_pem_x509_certificates(path.read_bytes())
    except (ValueError, OSError) as error:
        # OpenSSL, which the service uses, accepts some certificates that this parser rejects.
        return [skipped(check, f"{path}: its end cannot be read: {error}")]
    return _ends(check, path, authorities, now)


def _ends(
    check: str, path: Path, certificates: list[x509.Certificate], now: datetime
) -> list[Finding]:
    found = []
    for each in certificates:
        subject = each.subject.rfc4514_string() or ", ".join(_names(each)) or "a certificate"
        begin, end = each.not_valid_before_utc, each.not_valid_after_utc
        if end <= now:
            text = f"{path}: {subject} expired on {end:%Y-%m-%d %H:%M} UTC"
            found.append(failure(check, text, "replace the file; the service reloads it"))
        elif begin > now:
            text = f"{path}: {subject} is not valid before {begin:%Y-%m-%d %H:%M} UTC"
            found.append(failure(check, text, "check the clock, or replace the file"))
        elif end - now < EXPIRY_WARNING:
            text = f"{path}: {subject} expires on {end:%Y-%m-%d %H:%M} UTC"
            found.append(warning(check, text, "replace the file; the service reloads it"))
    return found


def _order(check: str, path: Path, chain: list[x509.Certificate]) -> list[Finding]:
    """Check that each certificate was issued by the next one, as TLS requires."""
    for issued, issuer in itertools.pairwise(chain):
        try:
            issued.verify_directly_issued_by(issuer)
        except Exception:  # noqa: BLE001 - ValueError, TypeError or InvalidSignature
            return [
                failure(
                    check,
                    f"{path}: a certificate was not issued by the one that follows it",
                    "put the server's certificate first, then its intermediate certificates",
                )
            ]
    return []


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (x509.ExtensionNotFound, ValueError):
        return []
    return [str(name.value) for name in extension.value]


def _handshake(certificate: Path, key: Path, ca: Path | None, name: str | None) -> str | None:
    """Return why a client would reject the certificate, or None.

    A handshake in memory applies the rules of OpenSSL. Without `ca`, the certificate itself is
    trusted, so that only its name is checked.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = name is not None
    try:
        server.load_cert_chain(certificate, key)
        client.load_verify_locations(ca or certificate)
    except (OSError, ValueError) as error:
        return f"{ca or certificate}: {error}"
    if ca is None:
        client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for step in range(STEPS_MAX):
        try:
            ends[step % 2].do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError as error:
            return error.verify_message
        except ssl.SSLError as error:
            return str(error)
        if step % 2 == 0:
            # The client has accepted it.
            return None
    return "the handshake does not end"
