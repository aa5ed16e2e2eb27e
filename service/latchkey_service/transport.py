"""The two transports, and what a connection may ask of either: the one seam between them.

docs/limits.md says of each limit who keeps it and what a client sees. What `native` has no option
for is kept by `connection_guard.py`, and what it takes of memory by `memory_guard.py`.
"""

import resource
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import grpc

from latchkey_service.config import Settings
from latchkey_service.exposure import Transport, transport_of

if TYPE_CHECKING:
    from latchkey_service.native import Refuse

__all__ = [
    "Limits",
    "limits_of",
    "make_transport",
    "metadata_of",
    "options_of",
]

# The contract has fields answered in words up to 4 MiB, the usual limit; the rest of such a
# message must fit in beside them, or the transport would refuse it without our details.
MESSAGE_BYTES_MAX: Final = 5 * 1024 * 1024
# Calls at once on a connection. RFC 9113 §6.5.2 advises no fewer; clients are told, and hold back
# what is more. All that a connection can make us keep is a multiple of this.
STREAMS_MAX: Final = 100
# All headers of a call, as HTTP/2 counts them. The largest that are ours are a credential and the
# certificates that a proxy hands on; gRPC's own clients have the same limit for answers.
METADATA_BYTES_MAX: Final = 16 * 1024
# How long a connection may be silent before it is asked, and may leave that, or what was sent to
# it, without an answer.
KEEPALIVE_SECONDS: Final = 30.0
KEEPALIVE_TIMEOUT_SECONDS: Final = 10.0
# Callers may ping this often. Our client library does each 330 s, as gRPC's servers want it by
# default; others were set up for servers that allow more. The third ping too many ends it.
PING_SECONDS_MIN: Final = 5.0
PING_STRIKES_MAX: Final = 2
# TLS and HTTP/2 have to be agreed on within this. Clients give up sooner.
HANDSHAKE_SECONDS: Final = 10.0
# After its age a connection gets no new calls, and those that it has may take this long.
AGE_GRACE_SECONDS: Final = 30.0
# Files that a worker has open beside its connections: database, log, libraries.
FILES_RESERVED: Final = 200
# A client that watches takes three with `native`: its own, and both ends of that to grpcio's part.
FILES_PER_CONNECTION: Final = {"native": 3, "grpcio": 1}
# gRPC's word for never, in milliseconds.
NEVER_MS: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What differs between deployments, and what tests make short. Times in seconds."""

    connections_max: int = 10_000
    """Of a listener. There is one in each worker for each address."""
    connection_age: float = 600.0
    """0: for ever."""
    age_grace: float = AGE_GRACE_SECONDS
    handshake: float = HANDSHAKE_SECONDS
    keepalive: float = KEEPALIVE_SECONDS
    keepalive_timeout: float = KEEPALIVE_TIMEOUT_SECONDS


def limits_of(settings: Settings) -> Limits:
    """Return the limits in force: no more connections than this process may open files for."""
    listeners = FILES_PER_CONNECTION[transport_of(settings)]
    if settings.tls_listen is not None:
        listeners += FILES_PER_CONNECTION["grpcio"]
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = settings.connections_max
    if files != resource.RLIM_INFINITY:
        connections = max(1, min(connections, (files - FILES_RESERVED) // listeners))
    return Limits(connections, settings.connection_age_seconds)


def make_transport(name: Transport, limits: Limits, refuse: "Refuse") -> grpc.aio.Server:
    """Return a server of the chosen make. `refuse` says how to refuse calls before they begin."""
    options = options_of(name, limits)
    if name == "native":
        # Here and not above, so that the other one needs nothing of it.
        from latchkey_service import native

        return native.Server(options, refuse)
    return grpc.aio.server(options=options)


def options_of(name: Transport, limits: Limits) -> list[tuple[str, int]]:
    """Return the options of a server of the chosen make."""
    options: dict[str, int] = {
        "grpc.max_receive_message_length": MESSAGE_BYTES_MAX,
        "grpc.max_concurrent_streams": STREAMS_MAX,
        # With it grpcio counts calls that are answered, but not put away yet, and refuses some at
        # random of a client that keeps to the limit: a quarter, of three times as many at once.
        "grpc.http.overload_protection": 0,
        # Both, or calls between the one and the other would be refused at random.
        "grpc.max_metadata_size": METADATA_BYTES_MAX,
        "grpc.absolute_max_metadata_size": METADATA_BYTES_MAX,
        "grpc.keepalive_time_ms": _ms(limits.keepalive),
        # With grpcio (1.75) this one is for what the kernel gets no acknowledgement of, and an
        # unanswered ping, left alone, takes the other's default of a minute.
        "grpc.keepalive_timeout_ms": _ms(limits.keepalive_timeout),
        "grpc.http2.ping_timeout_ms": _ms(limits.keepalive_timeout),
        "grpc.keepalive_permit_without_calls": 1,
        # No compression: a megabyte of it may stand for a gigabyte. (`native` has no such option.)
        "grpc.compression_enabled_algorithms_bitset": 1,
        # Several workers share the address. The supervisor has made sure that nobody else has it.
        "grpc.so_reuseport": 1,
    }
    if name == "native":
        return list(options.items())
    # `native` refuses to start with some of these. Its grpcio part goes without: it has only the
    # connections of `native`, one for each of its own.
    options |= {
        "grpc.max_allowed_incoming_connections": limits.connections_max,
        "grpc.server_handshake_timeout_ms": _ms(limits.handshake),
        "grpc.http2.min_ping_interval_without_data_ms": _ms(PING_SECONDS_MIN),
        "grpc.http2.max_ping_strikes": PING_STRIKES_MAX,
        # Clients spread anew over workers and servers, and certificates are looked at again. It
        # also ends who takes his answers never, and yet answers pings. gRPC spreads it by a tenth.
        "grpc.max_connection_age_ms": _ms(limits.connection_age) or NEVER_MS,
        "grpc.max_connection_age_grace_ms": _ms(limits.age_grace),
    }
    return list(options.items())


def metadata_of(context: Any) -> Any:
    """Return the metadata of a call: pairs, or None.

    As `native` has it where it serves the call itself. Its public method makes named tuples of all
    of them first, each time, which would cost a Verify more than all the rest of who calls.
    """
    try:
        return context._call.metadata  # noqa: SLF001 - see above; pinned to what was tested
    except AttributeError:
        return context.invocation_metadata()


def _ms(seconds: float) -> int:
    return min(NEVER_MS, round(seconds * 1_000))
