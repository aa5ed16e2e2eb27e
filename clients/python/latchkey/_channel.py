"""Opens gRPC channels with the library's settings, and states the reason for each number."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import grpc

from latchkey._version import __version__
from latchkey.errors import invalid

# Maximum delay before reconnecting to a server that is back. gRPC's default backs off up to two
# minutes.
RECONNECT_BACKOFF_FIRST_MS: Final = 100
RECONNECT_BACKOFF_MAX_MS: Final = 1_000
# Despite its name, this option limits one connection attempt. With the default of 20 s, a connect
# that gets no reply delays the next address for that long.
CONNECT_TIMEOUT_MS: Final = 2_000
# Delay before resolving a name again after a failure. The default is 30 s.
RESOLVE_AGAIN_MS: Final = 1_000
# By default gRPC servers answer pings less than 5 minutes apart with GOAWAY. The time-out below is
# what matters: once keepalive is on, Linux drops a connection whose data stays unacknowledged for
# that long (TCP_USER_TIMEOUT). Calls therefore leave a dead path within 5 s.
KEEPALIVE_TIME_MS: Final = 330_000
KEEPALIVE_TIMEOUT_MS: Final = 5_000
# 1,000 answers with 16 labels of 318 four-byte characters, 32 networks and 64 permissions take
# 27 MB. gRPC's default limit is 4 MB.
RECEIVE_MAX_BYTES: Final = 32 * 1024 * 1024

# The schemes of gRPC whose targets may contain a comma.
_SCHEME: Final = re.compile(r"(?:ipv4|ipv6|unix|unix-abstract|vsock|dns|xds):")

_SERVICE_CONFIG: Final = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})

_OPTIONS: Final[Mapping[str, str | int]] = {
    "grpc.primary_user_agent": f"latchkey-python/{__version__}",
    "grpc.service_config": _SERVICE_CONFIG,
    # Otherwise a TXT record of the target's name could configure unsafe retries.
    "grpc.service_config_disable_resolution": 1,
    # http_proxy is meant for web traffic. Secrets must not take a route that nobody chose for them.
    "grpc.enable_http_proxy": 0,
    # Clients must not share a connection: they would share its backoff, and the server could not
    # see that one of them has closed.
    "grpc.use_local_subchannel_pool": 1,
    "grpc.initial_reconnect_backoff_ms": RECONNECT_BACKOFF_FIRST_MS,
    "grpc.max_reconnect_backoff_ms": RECONNECT_BACKOFF_MAX_MS,
    "grpc.min_reconnect_backoff_ms": CONNECT_TIMEOUT_MS,
    "grpc.dns_min_time_between_resolutions_ms": RESOLVE_AGAIN_MS,
    "grpc.keepalive_time_ms": KEEPALIVE_TIME_MS,
    "grpc.keepalive_timeout_ms": KEEPALIVE_TIMEOUT_MS,
    "grpc.max_receive_message_length": RECEIVE_MAX_BYTES,
}


def options(overrides: Sequence[tuple[str, Any]] = ()) -> list[tuple[str, Any]]:
    """Return the channel arguments. `overrides` replace arguments of the same name."""
    return list({**_OPTIONS, **dict(overrides)}.items())


def check_target(target: str) -> None:
    """Raise InvalidArgument for a list of addresses without its scheme.

    gRPC would report a misformatted domain name, with the first call.
    """
    if "," in target and _SCHEME.match(target) is None:
        raise invalid(
            "target",
            "a list of addresses needs a scheme, such as ipv4:10.0.0.1:50051,10.0.0.2:50051",
        )


def open_channel(
    target: str,
    credentials: grpc.ChannelCredentials | None,
    overrides: Sequence[tuple[str, Any]] = (),
) -> grpc.aio.Channel:
    """Return a channel to `target` for the running event loop. It connects on the first call."""
    if credentials is None:
        if "," in target:
            # For a list of addresses, gRPC would send the whole list as the host name. A host name
            # contains no comma (RFC 3986 §3.2.2), and some servers reject one that does.
            overrides = (("grpc.default_authority", "latchkey"), *overrides)
        return grpc.aio.insecure_channel(target, options=options(overrides))
    return grpc.aio.secure_channel(target, credentials, options=options(overrides))
