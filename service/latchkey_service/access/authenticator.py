"""The active policy, and the authenticator of each listener, which authorizes every call.

Cost for a Verify: with a policy, one pass over the call's metadata, one hash and two look-ups, plus
one clock reading for a certificate. Without a policy there is no authenticator and no cost.

No message has been parsed yet when `authorize` runs: the paths of calls (`rpc`) pass only the
metadata.
"""

import math
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from latchkey_service.access import forwarded
from latchkey_service.access.certificate import CertificateError, read_certificate
from latchkey_service.access.credentials import bearer, digest_of
from latchkey_service.access.identity import by_certificate, conflict
from latchkey_service.access.methods import VERIFIER, AccountSource, rule_of
from latchkey_service.access.policy import Caller, Policy
from latchkey_service.errors import PermissionDenied, Unauthenticated, WatchRefused

__all__ = ["ActivePolicy", "Authenticator", "HasMetadata", "check_account"]

AUTHORIZATION: Final = "authorization"
# Total of the certificates and headers in the cache; enough for thousands of clients.
CACHE_BYTES_MAX: Final = 8 * 1024 * 1024
# Approximate overhead of a cache entry.
_ENTRY_BYTES: Final = 200
# Different credentials and headers that `screen` remembers.
SCREENED_MAX: Final = 10_000

_Evidence = TypeVar("_Evidence", str, bytes)


class HasMetadata(Protocol):
    """The part of a servicer's context that identifies the caller."""

    def invocation_metadata(self) -> Any:
        """Return the call's metadata as key-value pairs, or None."""
        ...

    def auth_context(self) -> Any:
        """Return the properties of the TLS peer: lists of bytes by name."""
        ...

    def peer(self) -> str:
        """Return the address of the connection's peer."""
        ...


class ActivePolicy:
    """The policy in force. Event loop only."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.since_unix_seconds = time.time()
        """When the policy was put in force."""
        self._watchers: list[Callable[[], None]] = []

    def replace(self, policy: Policy) -> None:
        """Activate another policy and notify observers, which end streams it no longer allows."""
        self.policy = policy
        self.since_unix_seconds = time.time()
        failures = []
        for changed in self._watchers:
            try:
                changed()
            except Exception as error:  # noqa: BLE001 - the others must know the policy too
                failures.append(error)
        if failures:
            # The worker then starts again, with this policy.
            raise failures[0]

    def on_change(self, changed: Callable[[], None]) -> None:
        """Call `changed` after each change to the policy."""
        self._watchers.append(changed)


class _Identity(NamedTuple):
    """The caller that a certificate or header identifies, and its expiry in POSIX seconds.

    `caller` is None if it identifies nobody.
    """

    caller: Caller | None
    ends_at: float


class Authenticator:
    """Identifies and authorizes the calls of one listener.

    `proxy` is the certificate name of the trusted proxy, or None. `metadata_of` returns the
    metadata of a call's context; `now` returns POSIX seconds. `recognized` is called with the peer
    of each call whose caller is known.

    Only a listener that no other machine can reach may trust a proxy. The settings are checked for
    that at startup (`exposure.py`), not per call by the peer's address: the `native` transport
    passes streams on through its own UNIX socket, where every peer looks local.
    """

    def __init__(
        self,
        active_policy: ActivePolicy,
        *,
        tls: bool = False,
        proxy: str | None = None,
        metadata_of: Callable[[Any], Any] = lambda context: context.invocation_metadata(),
        now: Callable[[], float] = time.time,
        recognized: Callable[[str], None] | None = None,
    ) -> None:
        self._active_policy = active_policy
        self._recognized = recognized
        self._tls = tls
        self._proxy = proxy
        self._metadata_of = metadata_of
        self._now = now
        # Identities under the policy `_cache_policy`. Reading a certificate takes ten times as
        # long as the rest of a call's authorization. None of the keys are secret.
        self._cache: dict[str | bytes, _Identity] = {}
        self._cache_bytes = 0
        self._cache_policy = active_policy.policy
        # Names by hash, under the policy `_screened_policy`.
        self._screened: dict[int, str] = {}
        self._screened_policy = active_policy.policy

    def screen(self, metadata: Any) -> str:
        """Return the name of the caller that a call's metadata identify. Raises Unauthenticated.

        Takes a quarter of a microsecond for evidence that was seen before. It compares hashes of 64
        bits, and not the expiry of a certificate: it decides who may wait for `authorize`, which
        then decides about the call. The hashes have a random key, so nobody can compute one.
        """
        policy = self._active_policy.policy
        if policy is not self._screened_policy or len(self._screened) >= SCREENED_MAX:
            self._screened.clear()
            self._screened_policy = policy
        evidence = 0
        for key, value in metadata or ():
            if key == AUTHORIZATION or (self._proxy is not None and key == forwarded.HEADER):
                evidence = hash((evidence, key, value))
        name = self._screened.get(evidence)
        if name is None:
            name = self._screened[evidence] = self._identify(metadata, None).name
        return name

    @property
    def trusts_proxy(self) -> bool:
        """Whether calls come through a trusted proxy, which reports the clients' addresses."""
        return self._proxy is not None

    def authorize(self, path: str, context: HasMetadata) -> Caller:
        """Return the caller if it may call `path`. Raises Unauthenticated or PermissionDenied."""
        caller = self.identify(context)
        if path not in caller.methods:
            raise PermissionDenied(
                "The policy does not allow this caller to call this method, which the role "
                f"{rule_of(path).role} includes.",
                "METHOD_DENIED",
                caller.name,
            )
        return caller

    def identify(self, context: HasMetadata) -> Caller:
        """Return the caller. Raises Unauthenticated."""
        caller = self._identify(self._metadata_of(context), context)
        if self._recognized is not None:
            self._recognized(context.peer())
        return caller

    def _identify(self, metadata: Any, context: HasMetadata | None) -> Caller:
        policy = self._active_policy.policy
        authorization = header = None
        for key, value in metadata or ():
            if key == AUTHORIZATION:
                if authorization is not None:
                    raise conflict()
                authorization = value
            elif key == forwarded.HEADER and self._proxy is not None:
                if header is not None:
                    raise _malformed_header()
                header = value
        caller = None
        if authorization is not None:
            caller = policy.credentials.get(digest_of(bearer(authorization)))
            if caller is None:
                raise Unauthenticated("Unknown or revoked credential.", "CREDENTIAL_UNKNOWN")
        by_tls = None
        if self._tls and context is not None:
            # Only the certificate itself contains the complete names (`certificate.py`).
            pem = (context.auth_context() or {}).get("x509_pem_cert")
            if pem:
                by_tls = self._cached(policy, pem[0], _identify_certificate)
        elif header is not None:
            by_tls = self._cached(policy, header, self._identify_forwarded)
        if caller is None or by_tls is None:
            caller = caller or by_tls
        elif caller is not by_tls:
            raise conflict()
        if caller is None:
            raise Unauthenticated(
                "The call is anonymous. Present a client certificate or the metadata "
                "'authorization: Bearer <credential>'.",
                "CALLER_ANONYMOUS",
            )
        return caller

    def _cached(
        self, policy: Policy, evidence: _Evidence, read: Callable[[Policy, _Evidence], _Identity]
    ) -> Caller | None:
        """Return the caller that `read` finds in `evidence`, from the cache if possible.

        Raises what `read` raises, and Unauthenticated for an expired certificate. Failures of
        `read` are not cached.
        """
        if policy is not self._cache_policy or self._cache_bytes > CACHE_BYTES_MAX:
            self._cache.clear()
            self._cache_bytes = 0
            self._cache_policy = policy
        found = self._cache.get(evidence)
        if found is None:
            found = self._cache[evidence] = read(policy, evidence)
            self._cache_bytes += len(evidence) + _ENTRY_BYTES
        # TLS checks the certificate only when a session begins. It does not check it again on a
        # long-lived connection, or when the session is resumed a day later (RFC 8446 §4.6.1).
        if self._now() >= found.ends_at:
            raise Unauthenticated("The client certificate has expired.", "CERTIFICATE_EXPIRED")
        return found.caller

    def _identify_forwarded(self, policy: Policy, header: str) -> _Identity:
        """Identify the client by the proxy's header; `caller` is None without a certificate."""
        try:
            found = forwarded.parse(header)
        except forwarded.ForwardedError:
            raise _malformed_header() from None
        if self._proxy not in found.by:
            raise Unauthenticated("The call came through an unknown proxy.", "PROXY_UNKNOWN")
        if not found.certificate:
            return _Identity(None, math.inf)
        if found.pem:
            return _identify_certificate(policy, found.pem)
        return _Identity(by_certificate(policy, found.uris, found.dns), math.inf)


def check_account(path: str, caller: Caller, request: Any) -> None:
    """Check the account in a request from a caller that the policy limits to certain accounts.

    Raises PermissionDenied if `account_id` is any other account, invalid, or empty, and for a call
    that affects all accounts. Raises WatchRefused for a Watch.
    """
    accounts, rule = caller.accounts, rule_of(path)
    if accounts is None:
        return
    if rule.account is AccountSource.REQUEST and not accounts.allow(request.account_id):
        raise PermissionDenied(
            "The policy does not allow this caller to act for this account.",
            "ACCOUNT_DENIED",
            caller.name,
        )
    if rule.account is AccountSource.ALL and rule.role != VERIFIER:
        raise PermissionDenied(
            "The call affects all accounts, and the policy limits this caller to some.",
            "ACCOUNT_DENIED",
            caller.name,
        )
    if rule.account is AccountSource.ALL:
        # The same error as from a server that grants no leases: the client library then calls
        # Verify each time.
        raise WatchRefused("Callers limited to accounts cannot hold leases.")


def _identify_certificate(policy: Policy, pem: bytes) -> _Identity:
    """Identify the caller of a certificate that TLS or the proxy has verified."""
    try:
        uris, dns, ends_at = read_certificate(pem.decode("ascii"))
    except (CertificateError, UnicodeDecodeError):
        raise Unauthenticated(
            "The client certificate contains an invalid subject alternative name.",
            "CERTIFICATE_MALFORMED",
        ) from None
    return _Identity(by_certificate(policy, uris, dns), ends_at)


def _malformed_header() -> Unauthenticated:
    return Unauthenticated(f"The metadata '{forwarded.HEADER}' is malformed.", "PROXY_MALFORMED")
