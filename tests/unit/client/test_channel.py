"""The arguments that the library gives its channels."""

import json
from typing import Any

from latchkey._channel import options


def test_a_service_that_came_back_is_tried_within_two_seconds() -> None:
    """Neither backing off nor a connect into a black hole nor stale addresses take longer."""
    arguments: dict[str, Any] = dict(options())
    for name in (
        "grpc.initial_reconnect_backoff_ms",
        "grpc.max_reconnect_backoff_ms",
        "grpc.min_reconnect_backoff_ms",
        "grpc.dns_min_time_between_resolutions_ms",
    ):
        assert 0 < arguments[name] <= 2_000


def test_keepalive_is_not_what_servers_punish() -> None:
    """Pings are more than the 5 minutes apart that a gRPC server tolerates by default."""
    assert dict(options())["grpc.keepalive_time_ms"] > 300_000


def test_nothing_from_outside_configures_the_channel() -> None:
    """No DNS record sets retries, no environment variable a proxy; calls go to all addresses."""
    arguments: dict[str, Any] = dict(options())
    assert arguments["grpc.service_config_disable_resolution"] == 1
    assert arguments["grpc.enable_http_proxy"] == 0
    config = json.loads(arguments["grpc.service_config"])
    assert config == {"loadBalancingConfig": [{"round_robin": {}}]}


def test_overrides_take_the_place_of_defaults() -> None:
    """An override replaces its namesake, and a new argument joins the others."""
    changed = options([("grpc.keepalive_time_ms", 1), ("grpc.x", "y")])
    names = [name for name, _ in changed]
    assert len(names) == len(set(names)) == len(options()) + 1
    assert ("grpc.keepalive_time_ms", 1) in changed
