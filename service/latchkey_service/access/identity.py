"""Maps the names in a client certificate to a caller of the policy. Pure.

A call may present a bearer credential as well (`credentials.py`). Each must be known, and both must
belong to the same caller: one valid identity does not make up for an invalid one.
"""

from collections.abc import Iterable
from typing import Final

from latchkey_service.access.policy import Caller, Policy
from latchkey_service.errors import Unauthenticated

__all__ = ["by_certificate", "conflict"]

_SPIFFE: Final = "spiffe://"


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
    return Unauthenticated(
        "The call presents the identities of several callers, such as a client certificate of one "
        "and a credential of another.",
        "IDENTITY_CONFLICT",
    )
