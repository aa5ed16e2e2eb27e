"""Registers the methods of the servicers, each on its path: verifies, managed calls, streams.

All handlers take encoded requests, and unary ones return encoded answers. So no message is parsed
before its caller is authorized. A real interceptor would run after parsing, and cost more per
Verify (call details, metadata, a chain of coroutines) than the Verify itself.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import grpc

from latchkey_service.access.authenticator import Authenticator
from latchkey_service.access.methods import BATCH_VERIFY, VERIFY, rule_of
from latchkey_service.errors import LatchkeyError
from latchkey_service.rpc.call_context import CallContext
from latchkey_service.rpc.call_report import Metadata
from latchkey_service.rpc.managed_calls import ManagedCalls
from latchkey_service.rpc.streams import Streams
from latchkey_service.rpc.traced_calls import CallTracing, Handler
from latchkey_service.rpc.verify_calls import VerifyCalls

__all__ = ["Paths", "Registrar"]

# Four times what grpcio accepts of a client that has acknowledged its limit. Until then, grpcio
# accepts 16 MiB, most of which may be references to one header (RFC 7541 §6.1), a byte each.
# Reading the metadata once costs the event loop 5 ms, and the usual path reads them several times.
METADATA_BYTES_MAX: Final = 64 * 1024
# What each header counts for besides its name and value (RFC 9113 §6.5.2).
HEADER_BYTES: Final = 32
# For the message of a known caller, where one of the largest may come over a slow link. Without a
# bound, a caller without a deadline could keep calls that wait for nothing.
MESSAGE_SECONDS: Final = 20.0


class Paths:
    """The three paths of calls. One instance per worker process."""

    def __init__(
        self,
        verifies: VerifyCalls,
        managed: ManagedCalls,
        streams: Streams,
        tracing: CallTracing | None = None,
    ) -> None:
        # None if no call is recorded. The handlers then stay as they are.
        self._tracing = tracing
        self._verifies = verifies
        self._managed = managed
        self._streams = streams
        self.unknown = managed.unknown
        """Returns a handler for the calls of unknown methods."""
        self.oversized = managed.oversized
        """Returns a handler for the calls with excessive metadata."""
        self.refuser = managed.refuser
        """Returns a handler for the calls of a method that no caller makes."""
        self.recheck = streams.recheck
        """Ends the streams that a new policy no longer allows."""

    def wrap(
        self,
        path: str,
        handler: "grpc.RpcMethodHandler[Any, Any]",
        authenticator: Authenticator | None,
        metadata_of: Callable[[Any], Metadata],
    ) -> Any:
        """Return the handler to register for `path` in place of `handler`, of generated code.

        `authenticator` authorizes the calls of the listener; None if there is no policy.
        `metadata_of` returns the metadata of a call's context. Raises LookupError for a method
        without a rule.
        """
        proxied = authenticator is not None and authenticator.trusts_proxy
        if rule_of(path).role is None:
            authenticator = None
        parse = handler.request_deserializer
        if parse is None:
            raise ValueError(f"{path} has no parser")
        if path in (VERIFY, BATCH_VERIFY):
            verify = self._verifies.handler(path, authenticator, metadata_of)
            traced = self._traced(path, verify, metadata_of, authenticator)
            return grpc.unary_unary_rpc_method_handler(traced)
        if handler.request_streaming:
            streaming: Any = handler.stream_stream
            if inspect.isasyncgenfunction(streaming):
                wrapped = self._streams.open_stream(path, streaming, parse, proxied=proxied)
            else:
                wrapped = self._streams.duplex(path, streaming, parse, authenticator)
            return grpc.stream_stream_rpc_method_handler(
                wrapped, response_serializer=handler.response_serializer
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._streams.open_stream(path, handler.unary_stream, parse, proxied=proxied),
                response_serializer=handler.response_serializer,
            )
        behaviour: Any = handler.unary_unary
        managed = self._managed.handler(path, behaviour, parse, authenticator)
        traced = self._traced(path, managed, metadata_of, authenticator)
        return grpc.unary_unary_rpc_method_handler(traced)

    def _traced(
        self,
        path: str,
        handler: Handler,
        metadata_of: Callable[[Any], Metadata],
        authenticator: Authenticator | None,
    ) -> Handler:
        if self._tracing is None:
            return handler
        return self._tracing.wrap(path, handler, metadata_of, authenticator)


class Registrar:
    """Acts as the server of a listener while servicers register, and wraps each handler.

    Registers the wrapped handlers with the transport in both ways. `native` itself serves handlers
    registered by name, except request streams, which it would give to a no-op of grpcio. grpcio's
    asyncio server, and the grpcio part of `native`, only look handlers up by path.

    grpcio refuses unary calls from unknown callers before it has received their messages. With
    `screen`, the metadata decide. With `by_certificate`, the connection does too.
    """

    def __init__(
        self,
        server: grpc.aio.Server,
        paths: Paths,
        authenticator: Authenticator | None,
        metadata_of: Callable[[Any], Metadata],
        screen: Callable[[Any], str] | None = None,
        *,
        by_certificate: bool = False,
    ) -> None:
        self._server = server
        self._paths = paths
        self._authenticator = authenticator
        self._metadata_of = metadata_of
        self._screen = screen
        self._by_certificate = by_certificate

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Do nothing, because generated code then registers the same handlers by name."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Wrap and register the handlers of a service, keyed by method name."""
        wrapped = {
            name: self._paths.wrap(
                f"/{service}/{name}", handler, self._authenticator, self._metadata_of
            )
            for name, handler in handlers.items()
        }
        by_path = {f"/{service}/{name}": handler for name, handler in wrapped.items()}
        unary = {n: handler for n, handler in wrapped.items() if not handler.request_streaming}
        refusing = {}
        authenticator = self._authenticator
        if authenticator is not None and (self._screen is not None or self._by_certificate):
            for name, handler in unary.items():
                path = f"/{service}/{name}"
                if rule_of(path).role is None:
                    continue
                parse = handlers[name].request_deserializer
                refuser = self._paths.refuser(path, parse, authenticator)
                if self._by_certificate:
                    by_path[path] = _identified_first(handler, refuser, authenticator)
                else:
                    refusing[path] = refuser
        oversized = self._paths.oversized()
        self._server.add_generic_rpc_handlers(
            (_ByPath(by_path, refusing, self._screen, oversized),)
        )
        self._server.add_registered_method_handlers(service, unary)

    def refuse_others(self) -> None:
        """Refuse calls of unknown methods at a limited rate. Call after all registrations.

        The transports answer them at once, and a flood of them would delay other calls.
        """
        handlers = _Unknown(self._paths.unknown(), self._paths.oversized())
        self._server.add_generic_rpc_handlers((handlers,))


def _is_oversized(metadata: Any) -> bool:
    """Return whether the metadata of a call exceed what any well-behaved client sends."""
    left = METADATA_BYTES_MAX
    for key, value in metadata or ():
        left -= len(key) + len(value) + HEADER_BYTES
        if left < 0:
            return True
    return False


def _identified_first(handler: Any, refuser: Any, authenticator: Authenticator) -> Any:
    """Return a handler that identifies the caller before it receives the message.

    grpcio shows the certificate only to a handler, and receives the message of a unary method
    before that. So the method gets the handler of a stream with one answer, which costs a twentieth
    more. The pipeline identifies the caller again, as on the other listeners.
    """
    serve: Callable[[bytes, CallContext], Awaitable[bytes]] = handler.unary_unary
    refuse: Callable[[Any, CallContext], Awaitable[None]] = refuser.stream_stream

    async def call(messages: Any, context: Any) -> bytes:
        try:
            authenticator.identify(context)
        except LatchkeyError:
            await refuse(messages, context)
            return b""
        try:
            async with asyncio.timeout(MESSAGE_SECONDS):
                data = await context.read()
        except TimeoutError:
            context.set_code(grpc.StatusCode.DEADLINE_EXCEEDED)
            context.set_details(f"The message did not arrive within {MESSAGE_SECONDS:g} s.")
            return b""
        if data is grpc.aio.EOF:
            context.set_code(grpc.StatusCode.UNIMPLEMENTED)
            context.set_details("The call has no message.")
            return b""
        return await serve(data, context)

    return grpc.stream_unary_rpc_method_handler(call)


class _ByPath(grpc.GenericRpcHandler):
    """Finds handlers by exact path; `native` treats handlers keyed by service as registered.

    For some paths, `refusing` contains other handlers, for calls that `screen` rejects. They are
    those of streams, which need no message: until one is read, grpcio lets the client send 64 KiB.
    `oversized` is the handler of calls with excessive metadata.
    """

    def __init__(
        self,
        handlers: Mapping[str, Any],
        refusing: Mapping[str, Any],
        screen: Callable[[Any], str] | None,
        oversized: Any,
    ) -> None:
        self._oversized = oversized
        self._handlers = handlers
        self._refusing = refusing
        self._screen = screen

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Return the handler of the call's method, or None."""
        path = handler_call_details.method
        if path not in self._handlers:
            return None
        if _is_oversized(handler_call_details.invocation_metadata):
            return self._oversized
        if self._screen is not None and path in self._refusing:
            try:
                self._screen(handler_call_details.invocation_metadata)
            except LatchkeyError:
                return self._refusing[path]
        return self._handlers[path]


class _Unknown(grpc.GenericRpcHandler):
    """Takes the calls that no other handler takes."""

    def __init__(self, handler: Any, oversized: Any) -> None:
        self._handler = handler
        self._oversized = oversized

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Return the handler."""
        if _is_oversized(handler_call_details.invocation_metadata):
            return self._oversized
        return self._handler
