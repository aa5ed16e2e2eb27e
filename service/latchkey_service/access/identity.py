"""What a call presents, turned into a caller of the policy. Pure.

A call may present a certificate and a bearer credential. Each that it presents must be known, and
all must be one caller's: who presents more is not let in by the better half of it.
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
    """Return whose credential this is. Raises Unauthenticated."""
    caller = policy.by_credential(digest_of(credential))
    if caller is None:
        raise Unauthenticated(
            "Nobody has this credential, or has it any more.", "CREDENTIAL_UNKNOWN"
        )
    return caller


def bearer(authorization: str | bytes) -> str:
    """Return the credential in the value of `authorization` (RFC 6750 §2.1).

    Raises Unauthenticated for anything else: who means to say who they are, and does not, is not
    taken for someone who says nothing. A credential has the shape of those that we make: were any
    text one, a policy with the digest of a guessable one would let in whoever guesses it.
    """
    if isinstance(authorization, str) and authorization[:_SCHEME_LENGTH].lower() == _SCHEME:
        credential = authorization[_SCHEME_LENGTH:]
        if is_credential(credential):
            return credential
    raise Unauthenticated(
        "The metadata 'authorization' has no bearer credential of a caller.",
        "CREDENTIAL_MALFORMED",
    )


def by_certificate(policy: Policy, uris: Iterable[str], dns: Iterable[str]) -> Caller:
    """Return whose certificate has these alternative names. Raises Unauthenticated.

    A SPIFFE URI names its holder alone; without one, DNS names do. Those that the policy does not
    have do not matter, as a certificate may have more names than anyone calls it by.
    """
    uris = tuple(uris)
    spiffe = [uri for uri in uris if uri.startswith(_SPIFFE)]
    if spiffe and len(uris) > 1:
        # SPIFFE X.509-SVID §2: such a certificate is to be rejected.
        raise Unauthenticated(
            "The client certificate has another URI beside a SPIFFE one.", "CERTIFICATE_MALFORMED"
        )
    names = spiffe or [name.lower() for name in dns]
    callers = {caller for name in names if (caller := policy.certificates.get(name))}
    if not callers:
        raise Unauthenticated(
            "The client certificate names no caller that is known.", "CERTIFICATE_UNKNOWN"
        )
    if len(callers) > 1:
        raise conflict()
    return callers.pop()


def conflict() -> Unauthenticated:
    """Return the error for a call that says to be several callers."""
    return Unauthenticated("The call presents several identities.", "IDENTITY_CONFLICT")
