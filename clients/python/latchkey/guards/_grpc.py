"""What both guards of gRPC share: which calls are exempt, and how the others are refused."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, NamedTuple

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from latchkey.guards._address import TrustedProxies, grpc_peer_address
from latchkey.guards._decision import Decision, Outcome, checked_permissions, checked_scope
from latchkey.guards._http import checked_api_key_header, checked_names
from latchkey.models import Scope

__all__ = ["CallRules", "Presented", "refusal", "remaining"]

# Status, text and ErrorInfo.reason. An expired, a deleted and an unknown token get the same text,
# so that holders cannot probe.
_REFUSALS: Final[Mapping[Outcome, tuple[grpc.StatusCode, str, str]]] = {
    Outcome.MISSING: (
        grpc.StatusCode.UNAUTHENTICATED,
        "No bearer token: send the metadata 'authorization: Bearer <token>'.",
        "TOKEN_MISSING",
    ),
    Outcome.INVALID: (
        grpc.StatusCode.UNAUTHENTICATED,
        "The bearer token is not valid.",
        "TOKEN_INVALID",
    ),
    Outcome.FORBIDDEN: (
        grpc.StatusCode.PERMISSION_DENIED,
        "The bearer token's scope does not include this call.",
        "TOKEN_SCOPE_INSUFFICIENT",
    ),
    Outcome.UNPERMITTED: (
        grpc.StatusCode.PERMISSION_DENIED,
        "The bearer token lacks a permission that this call requires.",
        "TOKEN_PERMISSIONS_INSUFFICIENT",
    ),
    Outcome.WRONG_ADDRESS: (
        grpc.StatusCode.PERMISSION_DENIED,
        "The bearer token may not be used from this address.",
        "TOKEN_ADDRESS_NOT_ALLOWED",
    ),
    Outcome.RATE_LIMITED: (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "The bearer token is used too often. Try again later.",
        "TOKEN_RATE_LIMITED",
    ),
    Outcome.UNAVAILABLE: (
        grpc.StatusCode.UNAVAILABLE,
        "The bearer token cannot be verified now. Try again later.",
        "VERIFIER_UNAVAILABLE",
    ),
}

# Longer than any verifier waits, so a call with a later deadline needs no other bound.
DEADLINE_SECONDS_MAX: Final = 3_600.0


class Presented(NamedTuple):
    """What a call presents in its metadata, and what its method requires."""

    authorization: Sequence[str]
    api_keys: Sequence[str]
    forwarded_for: Sequence[str]
    required_scope: Scope | None
    permissions: Collection[str]
    traceparent: Sequence[str]


class CallRules:
    """The options of a guard for gRPC. Raises TypeError or ValueError for a wrong one."""

    def __init__(
        self,
        required_scope: Scope | None,
        *,
        scopes: Mapping[str, Scope | None],
        required_permissions: Collection[str] = (),
        permissions: Mapping[str, Collection[str]] | None = None,
        trusted_proxies: Collection[str] = (),
        public: Collection[str],
        public_services: Collection[str],
        api_key_header: str | None,
    ) -> None:
        self._required_scope = checked_scope(required_scope)
        self._scopes = {name: checked_scope(scope) for name, scope in scopes.items()}
        self._required_permissions = checked_permissions(required_permissions)
        self._permissions = {
            name: checked_permissions(required) for name, required in (permissions or {}).items()
        }
        self._proxies = TrustedProxies(trusted_proxies)
        self._public = checked_names(public, "public")
        self._services = checked_names(public_services, "public_services")
        if wrong := sorted(name for name in self._services if "/" in name or not name):
            raise ValueError(f"public_services has full names such as 'pkg.Service': {wrong[0]!r}")
        self._api_key_header = checked_api_key_header(api_key_header)

    def exempts(self, method: str) -> bool:
        """Return whether a method ("/pkg.Service/Method") needs no token."""
        if method in self._public:
            return True
        first, _, rest = method.partition("/")
        service, separator, name = rest.partition("/")
        plain = first == "" and separator == "/" and name != "" and "/" not in name
        return plain and service in self._services

    def client_address(self, presented: Presented, context: Any) -> str:
        """Return the client's address, or "" if it is not known."""
        peer = grpc_peer_address(context.peer())
        return self._proxies.client_address(peer, presented.forwarded_for)

    def presented(self, method: str, metadata: Any) -> Presented:
        """Return what a call of `method` presents, and what the method requires."""
        found: dict[str, list[str]] = {
            "authorization": [],
            "x-forwarded-for": [],
            "traceparent": [],
        }
        if self._api_key_header is not None:
            found[self._api_key_header] = []
        for key, value in metadata or ():
            if (values := found.get(key.lower())) is not None:
                # Values should be bytes only for keys that end in "-bin". Do not rely on the
                # transport.
                values.append(value if isinstance(value, str) else value.decode("latin-1"))
        keys = () if self._api_key_header is None else found[self._api_key_header]
        return Presented(
            found["authorization"],
            keys,
            found["x-forwarded-for"],
            self._scopes.get(method, self._required_scope),
            self._permissions.get(method, self._required_permissions),
            found["traceparent"],
        )


def remaining(context: Any) -> float | None:
    """Return the seconds until the call's deadline, or None if it has none."""
    left: float | None = context.time_remaining()
    # Without a deadline, servers with threads count until the end of time.
    if left is None or left > DEADLINE_SECONDS_MAX:
        return None
    # A deadline that has just passed must not become "no deadline".
    return max(left, 0.001)


def refusal(
    decision: Decision,
) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str | bytes], ...]]:
    """Return the arguments for abort(): status, text, and rich details as trailing metadata."""
    code, text, reason = _REFUSALS[decision.outcome]
    details = [error_details_pb2.ErrorInfo(reason=reason, domain="latchkey")]
    pushback: list[tuple[str, str | bytes]] = []
    if decision.retry_after is not None:
        delay = Duration()
        delay.FromTimedelta(decision.retry_after)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        # gRPC's own retries read the delay only here (gRFC A6).
        pushback.append(("grpc-retry-pushback-ms", str(math.ceil(delay.ToNanoseconds() / 1e6))))
    if decision.limit is not None:
        # As RateLimit-Policy in HTTP.
        violation = error_details_pb2.QuotaFailure.Violation(
            subject="token", description=f"the token's rate limit is {decision.limit}"
        )
        details.append(error_details_pb2.QuotaFailure(violations=[violation]))
    status = status_pb2.Status(code=code.value[0], message=text)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    # Not abort_with_status(), which the contexts of sync handlers do not have.
    return code, text, (("grpc-status-details-bin", status.SerializeToString()), *pushback)
