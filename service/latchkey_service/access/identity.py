"""Maps the certificate and bearer credential of a call to a caller of the policy. Pure.

A call may present both. Each must be known, and both must belong to the same caller: one valid
identity does not make up for an invalid one.
"""

from collections.abc import Iterable
from typing import Final

from latchkey_service.access.credentials import digest_of, is_credential
from latchkey_service.access.policy import Caller, Policy
from latchkey_service.errors import Unauthenticated

__all__ = ["bearer", "by_certificate", "by_credential"]

_SPIFFE: Final = "spiffe://"
_SCHEME: Final = "bearer "
_SCHEME_LENGTH: Final = len(_SCHEME)


def by_credential(policy: Policy, credential: str) -> Caller:
    """Return the caller that owns this credential. Raises Unauthenticated."""
    caller = policy.credentials.get(digest_of(credential))
    if caller is None:
        raise Unauthenticated("Unknown or revoked credential.", "CREDENTIAL_UNKNOWN")
    return caller


def bearer(authorization: str | bytes) -> str:
    """Return the credential in the value of `authorization` (RFC 6750 §2.1).

    Raises Unauthenticated for any other value: a call with a malformed credential does not count as
    anonymous. Only text in the shape of our own credentials is accepted. Otherwise, a policy with
    the digest of a guessable text would admit anyone who guesses it.
    """
    if isinstance(authorization, str) and authorization[:_SCHEME_LENGTH].lower() == _SCHEME:
        credential = authorization[_SCHEME_LENGTH:]
        if is_credential(credential):
            return credential
    raise Unauthenticated(
        "The metadata 'authorization' does not contain a bearer credential of a caller.",
        "CREDENTIAL_MALFORMED",
    )


def by_certificate(policy: Policy, uris: Iterable[str], dns: Iterable[str]) -> Caller:
    """Return the caller with one of these alternative names. Raises Unauthenticated.

    A SPIFFE URI is the only name that counts; without one, DNS names count. Names that the policy
    does not list are ignored: a certificate may have more names than the policy uses.
    """
    uris = tuple(uris)
    spiffe = [uri for uri in uris if uri.startswith(_SPIFFE)]
    if spiffe and len(uris) > 1:
        # SPIFFE X.509-SVID §2 requires that such a certificate is rejected.
        raise Unauthenticated(
            "The client certificate has another URI besides its SPIFFE ID.", "CERTIFICATE_MALFORMED"
        )
    names = spiffe or [name.lower() for name in dns]
    callers = {caller for name in names if (caller := policy.certificates.get(name))}
    if not callers:
        raise Unauthenticated(
            "The client certificate does not name a known caller.", "CERTIFICATE_UNKNOWN"
        )
    if len(callers) > 1:
        raise conflict()
    return callers.pop()


def conflict() -> Unauthenticated:
    """Return the error for a call that identifies several callers."""
    return Unauthenticated("The call presents more than one identity.", "IDENTITY_CONFLICT")
