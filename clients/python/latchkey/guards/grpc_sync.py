"""Guard for grpc servers with threads.

    server = grpc.server(executor, interceptors=[GuardInterceptor(verifier, Scope.READ)])

This module translates a decision of `_decision` into a refusal. It blocks the thread of the call,
so it needs a `latchkey.sync.Verifier`. It judges a call once, when the call starts. A stream may
continue after its token has died.
"""

import contextvars
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeAlias

import grpc

from latchkey.guards._decision import (
    Decision,
    Outcome,
    SupportsVerifySync,
    check_verifier,
    decide_blocking,
    token_var,
)
from latchkey.guards._grpc import CallRules, refusal, remaining
from latchkey.models import Scope

__all__ = ["GuardInterceptor"]

# Handlers, messages and contexts belong to the guarded service and have any type.
# Quoted, because the class has no type parameters at run time.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Judge: TypeAlias = Callable[[Any], Decision]


class GuardInterceptor(grpc.ServerInterceptor):
    """Lets a call in if its bearer token is valid for the scope that the method requires.

    The options are those of `latchkey.guards.grpc.GuardInterceptor`, and so is its behaviour.
    """

    def __init__(
        self,
        verifier: SupportsVerifySync,
        required_scope: Scope | None,
        *,
        scopes: Mapping[str, Scope | None] | None = None,
        required_permissions: Collection[str] = (),
        permissions: Mapping[str, Collection[str]] | None = None,
        trusted_proxies: Collection[str] = (),
        public: Collection[str] = (),
        public_services: Collection[str] = (),
        api_key_header: str | None = None,
    ) -> None:
        check_verifier(verifier, for_threads=True)
        self._verifier = verifier
        self._rules = CallRules(
            required_scope,
            scopes=scopes or {},
            required_permissions=required_permissions,
            permissions=permissions,
            trusted_proxies=trusted_proxies,
            public=public,
            public_services=public_services,
            api_key_header=api_key_header,
        )

    # grpc-stubs' types are generic in message types, which an interceptor does not know.
    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Any],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the method's handler, wrapped so that it runs only for valid tokens."""
        handler = continuation(handler_call_details)
        method = handler_call_details.method
        if self._rules.exempts(method):
            return handler
        presented = self._rules.presented(method, handler_call_details.invocation_metadata)

        def judge(context: Any) -> Decision:
            return decide_blocking(
                self._verifier,
                presented.authorization,
                presented.required_scope,
                remaining(context),
                api_keys=presented.api_keys,
                client_address=self._rules.client_address(presented, context),
                permissions=presented.permissions,
                traceparent=presented.traceparent,
            )

        if handler is None:
            return grpc.stream_stream_rpc_method_handler(_unimplemented(judge))
        return _guarded(handler, judge)


def _guarded(handler: Handler, judge: _Judge) -> Handler:
    """Return `handler` behind `judge`: a handler of the same kind."""
    deserializer, parse = None, handler.request_deserializer or _as_is
    if handler.request_streaming:
        # A stream is parsed as it is read.
        deserializer, parse = handler.request_deserializer, _as_is
    streamed = (handler.request_streaming, handler.response_streaming)
    behaviour, make = {
        (False, False): (handler.unary_unary, grpc.unary_unary_rpc_method_handler),
        (False, True): (handler.unary_stream, grpc.unary_stream_rpc_method_handler),
        (True, False): (handler.stream_unary, grpc.stream_unary_rpc_method_handler),
        (True, True): (handler.stream_stream, grpc.stream_stream_rpc_method_handler),
    }[streamed]
    wrap = _streaming if handler.response_streaming else _unary
    making: Any = make
    guarded: Handler = making(
        wrap(behaviour, parse, judge), deserializer, handler.response_serializer
    )
    return guarded


# In each wrapper the service's code runs only in the branch for ALLOWED. Even if abort() returned,
# nothing would run. Other calls reuse the thread, so each call runs in a separate context.


def _unary(behaviour: Any, parse: Callable[[Any], Any], judge: _Judge) -> Any:
    def run(request: Any, context: Any) -> Any:
        decision = judge(context)
        if decision.outcome is Outcome.ALLOWED:
            own = contextvars.copy_context()
            own.run(token_var.set, decision.token)
            return own.run(behaviour, parse(request), context)
        return _refuse(context, decision)

    return run


def _streaming(behaviour: Any, parse: Callable[[Any], Any], judge: _Judge) -> Any:
    def run(request: Any, context: Any) -> Iterator[Any]:
        decision = judge(context)
        if decision.outcome is Outcome.ALLOWED:
            own = contextvars.copy_context()
            own.run(token_var.set, decision.token)
            responses = own.run(lambda: iter(behaviour(parse(request), context)))
            end = object()
            while (response := own.run(next, responses, end)) is not end:
                yield response
        else:
            _refuse(context, decision)

    return run


def _unimplemented(judge: _Judge) -> Any:
    """Return the handler for an unknown method. Only valid callers learn that it is unknown."""

    def run(_requests: Any, context: Any) -> Iterator[Any]:
        decision = judge(context)
        if decision.outcome is Outcome.ALLOWED:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        _refuse(context, decision)
        yield from ()

    return run


def _refuse(context: Any, decision: Decision) -> None:
    code, text, trailing = refusal(decision)
    # Unlike that of grpc.aio, abort() takes no metadata here.
    context.set_trailing_metadata(trailing)
    context.abort(code, text)


def _as_is(message: Any) -> Any:
    return message
