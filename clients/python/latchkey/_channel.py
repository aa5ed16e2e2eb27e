"""The gRPC channel as the library wants it. Every number has its reason here."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import grpc

from latchkey._version import __version__

# How soon a server that came back is tried again: gRPC's default backs off up to two minutes.
RECONNECT_BACKOFF_FIRST_MS: Final = 100
RECONNECT_BACKOFF_MAX_MS: Final = 1_000
# The time that one connection attempt gets, despite its name; the default of 20 s is what a
# connect into a black hole costs before the next address is tried.
CONNECT_TIMEOUT_MS: Final = 2_000
# When a name's addresses may be asked for again after a failure; the default is 30 s.
RESOLVE_AGAIN_MS: Final = 1_000
# gRPC servers answer pings that come under 5 minutes apart with GOAWAY, unless told otherwise. The
# time-out below is what matters: once keepalive is on, Linux drops a connection whose data stays
# unacknowledged for that long (TCP_USER_TIMEOUT), so calls leave a dead path within 5 s.
KEEPALIVE_TIME_MS: Final = 330_000
KEEPALIVE_TIMEOUT_MS: Final = 5_000
# 1,000 answers with 16 labels of 318 characters of 4 bytes each are 21 MB; gRPC's limit is 4 MB.
RECEIVE_MAX_BYTES: Final = 32 * 1024 * 1024

_SERVICE_CONFIG: Final = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})

_OPTIONS: Final[Mapping[str, str | int]] = {
    "grpc.primary_user_agent": f"latchkey-python/{__version__}",
    "grpc.service_config": _SERVICE_CONFIG,
    # Or a TXT record of the target's name could set retries that are not safe.
    "grpc.service_config_disable_resolution": 1,
    # http_proxy is set for the web. Secrets do not take a way that nobody chose for them.
    "grpc.enable_http_proxy": 0,
    # Two clients share no connection and so no backoff, and closing one is felt by the server.
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
    """Return the channel arguments, with `overrides` in place of those of the same name."""
    return list({**_OPTIONS, **dict(overrides)}.items())


def open_channel(
    target: str,
    credentials: grpc.ChannelCredentials | None,
    overrides: Sequence[tuple[str, Any]] = (),
) -> grpc.aio.Channel:
    """Return a channel to `target` for the running event loop. It connects with the first call."""
    if credentials is None:
        if "," in target:
            # A list of addresses, all of which gRPC would send as the host's name. A name has no
            # comma (RFC 3986 §3.2.2), and there are servers that refuse one that does.
            overrides = (("grpc.default_authority", "latchkey"), *overrides)
        return grpc.aio.insecure_channel(target, options=options(overrides))
    return grpc.aio.secure_channel(target, credentials, options=options(overrides))
