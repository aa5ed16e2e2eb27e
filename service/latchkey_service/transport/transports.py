"""The two transports and their limits on connections: the only seam between them.

docs/limits.md lists each limit, the component that enforces it, and what clients see.
`connection_guard.py` and `process/worker_watch.py` enforce the limits for which `native` has no
option.
"""

import resource
from collections.abc import Callable
from dataclasses import dataclass
from operator import methodcaller
from typing import TYPE_CHECKING, Any, Final

import grpc

from latchkey_service.settings.exposure import Transport, transport_of
from latchkey_service.settings.settings import Settings

if TYPE_CHECKING:
    from latchkey_service.transport.native import Reject, Screen

__all__ = [
    "Limits",
    "limits_of",
    "make_transport",
    "metadata_reader",
    "options_of",
]

# The contract promises clear errors for fields of up to 4 MiB, gRPC's usual limit. The rest of such
# a message must fit as well, or the transport would reject it without our details.
MESSAGE_BYTES_MAX: Final = 5 * 1024 * 1024
# Concurrent calls per connection. RFC 9113 §6.5.2 advises at least 100. Clients learn the limit and
# hold back further calls. The memory that one connection can tie up is a multiple of this: with 25,
# an anonymous burst takes a third of the memory, and delays others by a sixth of the time. But a
# caller far away could then make only 25 calls in each round trip. `maximum_concurrent_rpcs` of
# grpcio does not suit, because it counts known callers too. Smaller buffers do not help.
STREAMS_MAX: Final = 100
# All headers of a call, as HTTP/2 counts them. Our largest are a credential and the certificates
# that a proxy passes on. gRPC clients have the same limit for answers.
METADATA_BYTES_MAX: Final = 16 * 1024
# Idle time before a connection is pinged, and the time to answer the ping or to acknowledge data.
KEEPALIVE_SECONDS: Final = 30.0
KEEPALIVE_TIMEOUT_SECONDS: Final = 10.0
# Minimum interval between a client's pings. Our client library pings every 330 s, which gRPC
# servers allow by default; other clients may be configured for more. The third excess ping ends the
# connection.
PING_SECONDS_MIN: Final = 5.0
PING_STRIKES_MAX: Final = 2
# Time limit for the TLS and HTTP/2 handshakes. Clients give up sooner.
HANDSHAKE_SECONDS: Final = 10.0
# How long calls may continue on a connection that has reached its maximum age.
AGE_GRACE_SECONDS: Final = 30.0
# Open files of a worker besides its connections: database, log, libraries, and the next constant.
FILES_RESERVED: Final = 300
# Connections above the limit that grpcio accepts, so that the connection guard can end others
# instead of the newest.
CONNECTIONS_SPARE: Final = 100
# With `native`, a client that watches uses three: its own, and both ends of a connection to grpcio.
FILES_PER_CONNECTION: Final = {"native": 3, "grpcio": 1}
# "Never" in gRPC, in milliseconds.
NEVER_MS: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits that differ between deployments or that tests shorten. Times are in seconds."""

    connections_max: int = 10_000
    """Per listener. Each worker has one listener for each address."""
    connections_per_address: int = 0
    """Per listener and peer address. 0 means no limit."""
    connection_age: float = 600.0
    """0 means no limit."""
    age_grace: float = AGE_GRACE_SECONDS
    handshake: float = HANDSHAKE_SECONDS
    keepalive: float = KEEPALIVE_SECONDS
    keepalive_timeout: float = KEEPALIVE_TIMEOUT_SECONDS


def limits_of(settings: Settings) -> Limits:
    """Return the limits in force, with connections capped by the limit on open files."""
    listeners = FILES_PER_CONNECTION[transport_of(settings)]
    if settings.tls_listen is not None:
        listeners += FILES_PER_CONNECTION["grpcio"]
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = settings.connections_max
    if files != resource.RLIM_INFINITY:
        connections = max(1, min(connections, (files - FILES_RESERVED) // listeners))
    return Limits(connections, settings.connections_per_address, settings.connection_age_seconds)


def make_transport(
    name: Transport, limits: Limits, reject: "Reject", screen: "Screen | None" = None
) -> grpc.aio.Server:
    """Create the server of a transport.

    `reject` rejects calls before they start, and `screen` identifies the callers of calls that
    wait; None if there is no policy.
    """
    options = options_of(name, limits)
    if name == "native":
        # Imported here, so that grpcio works without the library.
        from latchkey_service.transport import native  # noqa: PLC0415

        return native.Server(options, reject, screen=screen)
    return grpc.aio.server(options=options)


def options_of(name: Transport, limits: Limits) -> list[tuple[str, int]]:
    """Return the options for the server of a transport."""
    options: dict[str, int] = {
        "grpc.max_receive_message_length": MESSAGE_BYTES_MAX,
        "grpc.max_concurrent_streams": STREAMS_MAX,
        # With this option, grpcio also counts calls that are answered but not cleaned up yet. It
        # then rejects random calls of clients that keep to the limit: a quarter of them, with three
        # times as many calls at once.
        "grpc.http.overload_protection": 0,
        # Set both: grpcio rejects random calls with a size between the two.
        "grpc.max_metadata_size": METADATA_BYTES_MAX,
        "grpc.absolute_max_metadata_size": METADATA_BYTES_MAX,
        "grpc.keepalive_time_ms": _ms(limits.keepalive),
        # In grpcio (1.75), this timeout applies to data that the peer's kernel does not
        # acknowledge. The other one applies to unanswered pings, and defaults to a minute.
        "grpc.keepalive_timeout_ms": _ms(limits.keepalive_timeout),
        "grpc.http2.ping_timeout_ms": _ms(limits.keepalive_timeout),
        "grpc.keepalive_permit_without_calls": 1,
        # No compression: a megabyte may expand to a gigabyte. (`native` has no such option.)
        "grpc.compression_enabled_algorithms_bitset": 1,
        # Workers share the address. The supervisor ensures that no other program uses it.
        "grpc.so_reuseport": 1,
    }
    if name == "native":
        return list(options.items())
    # `native` refuses to start with some of these. Its inner grpcio server does without them,
    # because its only connections come from `native`, one for each client connection.
    options |= {
        "grpc.max_allowed_incoming_connections": limits.connections_max + CONNECTIONS_SPARE,
        "grpc.server_handshake_timeout_ms": _ms(limits.handshake),
        "grpc.http2.min_ping_interval_without_data_ms": _ms(PING_SECONDS_MIN),
        "grpc.http2.max_ping_strikes": PING_STRIKES_MAX,
        # Spreads clients over workers and servers again, and checks certificates again. It also
        # ends a client that answers pings but never reads. gRPC varies the age by a tenth.
        "grpc.max_connection_age_ms": _ms(limits.connection_age) or NEVER_MS,
        "grpc.max_connection_age_grace_ms": _ms(limits.age_grace),
    }
    return list(options.items())


def metadata_reader(name: Transport) -> Callable[[Any], Any]:
    """Return the function that returns the metadata of a call as key-value pairs, or None."""
    if name == "native":
        from latchkey_service.transport.native import metadata_of  # noqa: PLC0415

        return metadata_of
    return methodcaller("invocation_metadata")


def _ms(seconds: float) -> int:
    return min(NEVER_MS, round(seconds * 1_000))
