"""A relay in front of the real TokenService that fails on demand.

It forwards raw bytes, so every answer is real unless a test asks the relay to alter it.
"""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

SERVICE = "/latchkey.v1.TokenService/"
CALL_SECONDS = 30.0


@dataclass
class Fault:
    """How a method's calls fail."""

    code: grpc.StatusCode | None = None
    """The status that replaces the real answer."""
    reaches: bool = False
    """Whether the call still reaches the service, so that only its answer is lost."""
    seconds: float = 0.0
    """Seconds by which the answer is delayed."""
    release: threading.Event | None = None
    """The answer waits until this event is set."""
    times: int = 1_000_000
    """The number of calls that fail."""
    spares: int = 0
    """The number of calls that succeed first."""


class Relay:
    """The relay, which listens on `address`."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target)
        self._faults: dict[str, Fault] = {}
        self._server = grpc.server(ThreadPoolExecutor(16))
        self._server.add_generic_rpc_handlers((_Handler(self),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self.calls: list[str] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._server.start()

    @contextmanager
    def failing(self, *methods: str, **fault: Any) -> Iterator[None]:
        """Make calls of these methods fail within the block, as Fault describes."""
        self._faults |= {method: Fault(**fault) for method in methods}
        try:
            yield
        finally:
            for method in methods:
                del self._faults[method]

    def well(self) -> None:
        """Forward all calls again."""
        self._faults.clear()

    def close(self) -> None:
        self._ended.set()
        self._server.stop(None).wait()
        self._channel.close()

    def relay(self, path: str, request: bytes, context: grpc.ServicerContext) -> bytes:
        method = path.removeprefix(SERVICE)
        with self._lock:
            self.calls.append(method)
            fault = self._faults.get(method)
            if fault is not None and fault.spares:
                fault.spares -= 1
                fault = None
            elif fault is not None:
                fault.times -= 1
                fault = fault if fault.times >= 0 else None
        if fault is None or fault.code is None or fault.reaches:
            answer = self._ask(path, request, context)
        if fault is not None:
            # The caller's deadline or the end of the relay bounds this wait.
            end = time.monotonic() + fault.seconds
            while context.is_active() and not self._ended.is_set():
                held = fault.release is not None and not fault.release.is_set()
                if not held and time.monotonic() >= end:
                    break
                self._ended.wait(0.01)
            if fault.code is not None:
                context.abort(fault.code, "a test made the relay fail")
        return answer

    def _ask(self, path: str, request: bytes, context: grpc.ServicerContext) -> bytes:
        call: Any = self._channel.unary_unary(path)
        try:
            answer: bytes = call(request, timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            failed: Any = error
            context.set_trailing_metadata(failed.trailing_metadata())
            context.abort(failed.code(), failed.details())
        return answer


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler:
        path = handler_call_details.method
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: self._relay.relay(path, request, context)
        )
