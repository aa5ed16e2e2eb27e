"""The gate: the policy in force, and the way in of each listener. Every call goes through one.

What it costs a Verify is part of its design: with a policy, one pass over the call's metadata, one
hash and two look-ups, with a certificate a look at the clock; without, nothing, since then there is
no gate (`calls.py`).
"""

import math
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from latchkey_proto.v1 import token_service_pb2 as pb

from latchkey_service.access import forwarded
from latchkey_service.access.certificate import CertificateError, read_certificate
from latchkey_service.access.identity import bearer, by_certificate, by_credential, conflict
from latchkey_service.access.methods import OPERATOR, Account, rule_of
from latchkey_service.access.policy import Caller, Policy
from latchkey_service.errors import PermissionDenied, Unauthenticated, WatchRefused

__all__ = ["Door", "Gate", "check_account", "within_accounts"]

AUTHORIZATION: Final = "authorization"
# Of certificates and headers that are remembered, together: those of thousands of clients.
REMEMBERED_BYTES_MAX: Final = 8 * 1024 * 1024
# What an entry takes beside its bytes, about.
_ENTRY_BYTES: Final = 200

_Shown = TypeVar("_Shown", str, bytes)


class HasMetadata(Protocol):
    """The part of a servicer's context that tells who calls."""

    def invocation_metadata(self) -> Any:
        """Return the call's metadata, keys and values; None for none."""
        ...

    def auth_context(self) -> Any:
        """Return what TLS knows of the peer, lists of bytes by name."""
        ...


class Gate:
    """The policy in force. Belongs to the event loop."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._watchers: list[Callable[[], None]] = []

    def replace(self, policy: Policy) -> None:
        """Put another policy in force. Streams that it does not allow any more are told to end."""
        self.policy = policy
        for changed in self._watchers:
            changed()

    def on_change(self, changed: Callable[[], None]) -> None:
        """Call `changed` after each change of the policy."""
        self._watchers.append(changed)


class _Shows(NamedTuple):
    """Whose a certificate or a header is, None: nobody's, and until when, in POSIX seconds."""

    caller: Caller | None
    ends_at: float


class Door:
    """One listener's way in. `proxy` is the name of the proxy to believe, None: none.
    `metadata_of` returns the metadata of a call's context, `now` POSIX seconds.

    A proxy is believed on a listener that only this machine's processes reach, which is settled
    when the service starts (`exposure.py`), and not by each call's peer: the `native` transport
    hands streams on through a UNIX socket of its own, where every peer looks like a local one.
    """

    def __init__(
        self,
        gate: Gate,
        *,
        tls: bool = False,
        proxy: str | None = None,
        metadata_of: Callable[[Any], Any] = lambda context: context.invocation_metadata(),
        now: Callable[[], float] = time.time,
    ) -> None:
        self._gate = gate
        self._tls = tls
        self._proxy = proxy
        self._metadata_of = metadata_of
        self._now = now
        # Whose a certificate or a header is, by the policy of then: each call has it again, and to
        # read it takes ten times as long as all the rest here. They are no secrets.
        self._remembered: dict[str | bytes, _Shows] = {}
        self._remembered_bytes = 0
        self._remembered_by = gate.policy

    def admit(self, path: str, context: HasMetadata) -> Caller:
        """Return the caller, who may call the method. Raises Unauthenticated, PermissionDenied."""
        caller = self.identify(context)
        if path not in caller.methods:
            raise PermissionDenied(
                "The policy does not let this caller call this method.",
                "METHOD_DENIED",
                caller.name,
            )
        return caller

    def identify(self, context: HasMetadata) -> Caller:
        """Return who calls. Raises Unauthenticated."""
        policy = self._gate.policy
        authorization = header = None
        for key, value in self._metadata_of(context) or ():
            if key == AUTHORIZATION:
                if authorization is not None:
                    raise conflict()
                authorization = value
            elif key == forwarded.HEADER and self._proxy is not None:
                if header is not None:
                    raise _not_of_its_form()
                header = value
        caller = None
        if authorization is not None:
            caller = by_credential(policy, bearer(authorization))
        by_tls = None
        if self._tls:
            # Only the certificate itself has its names whole (`certificate.py`).
            pem = (context.auth_context() or {}).get("x509_pem_cert")
            if pem:
                by_tls = self._remember(policy, pem[0], _of_certificate)
        elif header is not None:
            by_tls = self._remember(policy, header, self._of_proxy)
        if caller is None or by_tls is None:
            caller = caller or by_tls
        elif caller is not by_tls:
            raise conflict()
        if caller is None:
            raise Unauthenticated(
                "Say who calls: by a client certificate, or by the metadata 'authorization: Bearer "
                "<credential>'.",
                "CALLER_ANONYMOUS",
            )
        return caller

    def _remember(
        self, policy: Policy, shown: _Shown, read: Callable[[Policy, _Shown], _Shows]
    ) -> Caller | None:
        """Return whom `read` makes of what was shown, and has made of it before. Raises as it does,
        and Unauthenticated for a certificate that has ended.

        Only what names somebody is remembered.
        """
        if policy is not self._remembered_by or self._remembered_bytes > REMEMBERED_BYTES_MAX:
            self._remembered.clear()
            self._remembered_bytes = 0
            self._remembered_by = policy
        found = self._remembered.get(shown)
        if found is None:
            found = self._remembered[shown] = read(policy, shown)
            self._remembered_bytes += len(shown) + _ENTRY_BYTES
        # TLS looks at it when a session begins, and then no more: not on a connection that lasts,
        # nor on one that resumes the session a day later (RFC 8446 §4.6.1).
        if self._now() >= found.ends_at:
            raise Unauthenticated("The client certificate has expired.", "CERTIFICATE_EXPIRED")
        return found.caller

    def _of_proxy(self, policy: Policy, header: str) -> _Shows:
        """Return whose certificate the proxy has seen, None for no certificate."""
        try:
            said = forwarded.parse(header)
        except forwarded.ForwardedError:
            raise _not_of_its_form() from None
        if self._proxy not in said.by:
            raise Unauthenticated("The call came by a proxy that is not known.", "PROXY_UNKNOWN")
        if not said.certificate:
            return _Shows(None, math.inf)
        if said.pem:
            return _of_certificate(policy, said.pem)
        return _Shows(by_certificate(policy, said.uris, said.dns), math.inf)


def check_account(path: str, caller: Caller, request: Any) -> None:
    """Check the account that a request names, for a caller limited to some.

    Raises PermissionDenied: for an account that is not theirs, valid or not, for none, and for
    what is about all accounts at once; WatchRefused for a Watch.
    """
    accounts, rule = caller.accounts, rule_of(path)
    if accounts is None:
        return
    if rule.account is Account.REQUEST and not accounts.allow(request.account_id):
        raise PermissionDenied(
            "The policy does not let this caller act for this account.",
            "ACCOUNT_DENIED",
            caller.name,
        )
    if rule.account is Account.ALL and rule.role == OPERATOR:
        raise PermissionDenied(
            "The call affects all accounts, and the policy limits this caller to some.",
            "ACCOUNT_DENIED",
            caller.name,
        )
    if rule.account is Account.ALL:
        # As a server says that grants no leases to anybody: a client library then verifies by
        # asking each time.
        raise WatchRefused("Callers that are limited to accounts are granted no leases.")


def within_accounts(path: str, caller: Caller, answer: bytes) -> bytes:
    """Return a verify's encoded answer as a caller limited to accounts may have it.

    Another account's token is UNKNOWN to them, as one that nobody ever made.
    """
    accounts = caller.accounts
    if accounts is None or rule_of(path).account is not Account.ANSWER:
        return answer
    response: Any
    if path.endswith("/BatchVerify"):
        response = pb.BatchVerifyResponse.FromString(answer)
        verifications = list(response.responses)
    else:
        response = pb.VerifyResponse.FromString(answer)
        verifications = [response]
    for verification in verifications:
        if verification.HasField("token"):
            if accounts.allow(verification.token.account_id):
                continue
            verification.verdict = pb.VERDICT_UNKNOWN
        # Most secrets that nobody ever made need no read, and so have no position. Another
        # account's token must not be told from them by its position, even after it was purged.
        verdict = verification.verdict
        verification.Clear()
        verification.verdict = verdict
    encoded: bytes = response.SerializeToString()
    return encoded


def _of_certificate(policy: Policy, pem: bytes) -> _Shows:
    """Return whose certificate this is, which TLS or the proxy has verified."""
    try:
        uris, dns, ends_at = read_certificate(pem.decode("ascii"))
    except (CertificateError, UnicodeDecodeError):
        raise Unauthenticated(
            "The client certificate has a name that is none.", "CERTIFICATE_MALFORMED"
        ) from None
    return _Shows(by_certificate(policy, uris, dns), ends_at)


def _not_of_its_form() -> Unauthenticated:
    return Unauthenticated(
        f"The metadata '{forwarded.HEADER}' is not of its form.", "PROXY_MALFORMED"
    )
