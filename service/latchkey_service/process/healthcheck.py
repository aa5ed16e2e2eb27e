"""Check the health of the running service: `python -m latchkey_service.process.healthcheck`.

For container engines and service managers. It calls the service on its plaintext address, like any
client. `periodic.py` determines the answer.
"""

import sys
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from latchkey_service.settings import loading

__all__ = ["NOT_SERVING", "SERVING", "ask", "main", "target"]

# The server answers without the database, so one that takes longer is unhealthy.
TIMEOUT_SECONDS: Final = 2.0
SERVING: Final = "SERVING"
NOT_SERVING: Final = "NOT_SERVING"
# If the server listens on all addresses, use the loopback address.
_LOCAL: Final = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - not bound
_OPTIONS: Final = (
    # A proxy in the environment is for outgoing calls; this one is local.
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_reconnect_backoff_ms", 200),
)


def main() -> int:
    """Return 0 if the service reports SERVING within 2 seconds, else 1 with a reason on stderr."""
    try:
        address = target(loading.load(together=False).listen)
        status = ask(address)
    except (loading.ConfigError, ValueError) as error:
        return _unhealthy(str(error))
    except grpc.RpcError as error:
        return _unhealthy(f"{error.code().name}: {error.details()}")
    return 0 if status == SERVING else _unhealthy(status)


def ask(address: str) -> str:
    """Return the status that the service at a plaintext address reports. Raises grpc.RpcError."""
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its stub types lack the methods
        # Not wait_for_ready: a refused connection is a final answer.
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def target(listen: str) -> str:
    """Return the address for reaching a server on this machine that listens on `listen`.

    Raises ValueError for port 0, because the server then uses any free port.
    """
    if listen.startswith("unix:"):
        return listen
    host, _, port = listen.rpartition(":")
    if int(port) == 0:
        raise ValueError("LATCHKEY_LISTEN has port 0, so the actual port is unknown")
    return f"{_LOCAL.get(host, host)}:{port}"


def _unhealthy(reason: str) -> int:
    print(f"latchkey: not serving: {reason}", file=sys.stderr)  # noqa: T201 - output of a command
    return 1


if __name__ == "__main__":
    sys.exit(main())
