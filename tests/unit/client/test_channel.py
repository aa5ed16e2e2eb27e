"""The channel arguments of the library."""

import json
from typing import Any

import latchkey
import pytest
from latchkey._channel import options


def test_a_returning_service_is_retried_within_two_seconds() -> None:
    """Neither backoff, nor a connect without a reply, nor stale addresses take longer."""
    arguments: dict[str, Any] = dict(options())
    for name in (
        "grpc.initial_reconnect_backoff_ms",
        "grpc.max_reconnect_backoff_ms",
        "grpc.min_reconnect_backoff_ms",
        "grpc.dns_min_time_between_resolutions_ms",
    ):
        assert 0 < arguments[name] <= 2_000


def test_keepalive_pings_are_tolerated_by_servers() -> None:
    """Pings are more than 5 minutes apart, which gRPC servers tolerate by default."""
    assert dict(options())["grpc.keepalive_time_ms"] > 300_000


def test_environment_and_dns_do_not_configure_the_channel() -> None:
    """DNS records set no retries, environment variables set no proxy. Calls go to all addresses."""
    arguments: dict[str, Any] = dict(options())
    assert arguments["grpc.service_config_disable_resolution"] == 1
    assert arguments["grpc.enable_http_proxy"] == 0
    config = json.loads(arguments["grpc.service_config"])
    assert config == {"loadBalancingConfig": [{"round_robin": {}}]}


def test_overrides_replace_defaults() -> None:
    """An override replaces the argument of the same name. A new argument is added."""
    changed = options([("grpc.keepalive_time_ms", 1), ("grpc.x", "y")])
    names = [name for name, _ in changed]
    assert len(names) == len(set(names)) == len(options()) + 1
    assert ("grpc.keepalive_time_ms", 1) in changed


@pytest.mark.parametrize("target", ["127.0.0.1:1,127.0.0.1:2", "a.example:1,b.example:1"])
def test_a_list_of_addresses_needs_its_scheme(target: str) -> None:
    """A list without `ipv4:` is reported when the client is made, with the form that works."""
    with pytest.raises(latchkey.InvalidArgument, match=r"ipv4:10\.0\.0\.1:50051,10\.0\.0\.2:50051"):
        latchkey.Client(target)
    for good in ("ipv4:127.0.0.1:1,127.0.0.1:2", "dns:///a.example:1", "unix:/a,b"):
        latchkey.Client(good)
