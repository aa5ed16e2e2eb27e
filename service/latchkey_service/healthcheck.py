"""Ask the running service whether it serves: `python -m latchkey_service.healthcheck`.

For container engines and service managers. It owns the question, over the same plaintext address
as every caller; what the answer depends on is the server's affair (`server.py`).
"""

import sys
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from latchkey_service import config

__all__ = ["main", "target"]

# Health is answered from memory: a server that takes longer is not well.
TIMEOUT_SECONDS: Final = 2.0
# Where a server listens on every address, it is asked on this machine's own.
_LOCAL: Final = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # nosec B104 # noqa: S104 - not bound
_OPTIONS: Final = (
    # A proxy that the environment names is for the way out, and this is not one.
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_reconnect_backoff_ms", 200),
)


def main() -> int:
    """Return 0 if the service says SERVING within 2 seconds, else 1, with the reason on stderr."""
    try:
        address = target(config.load(together=False).listen)
        with grpc.insecure_channel(address, options=_OPTIONS) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # its types know of no methods
            # Not wait_for_ready: a refused connection is an answer.
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS)
    except (config.ConfigError, ValueError) as error:
        return _unwell(str(error))
    except grpc.RpcError as error:
        return _unwell(f"{error.code().name}: {error.details()}")
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        return _unwell(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
    return 0


def target(listen: str) -> str:
    """Return where to reach a server on this machine that listens on `listen`.

    Raises ValueError for port 0, which stands for any free one.
    """
    if listen.startswith("unix:"):
        return listen
    host, _, port = listen.rpartition(":")
    if int(port) == 0:
        raise ValueError("LATCHKEY_LISTEN names port 0: which one that became cannot be known")
    return f"{_LOCAL.get(host, host)}:{port}"


def _unwell(reason: str) -> int:
    print(f"latchkey: not serving: {reason}", file=sys.stderr)  # noqa: T201 - for a person
    return 1


if __name__ == "__main__":
    sys.exit(main())
