"""Guard for grpc.aio servers.

    server = grpc.aio.server(interceptors=[GuardInterceptor(verifier, Scope.READ)])

This module translates a decision of `_decision` into a refusal. It judges a call once, when the
call starts. A stream may continue after its token has died.
"""

import asyncio
import contextvars
import inspect
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Mapping,
)
from concurrent.futures import CancelledError as FutureCancelledError
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import grpc

from latchkey.guards._decision import (
    Decision,
    Outcome,
    SupportsVerify,
    check_verifier,
    decide,
    decide_nowait,
    token_var,
)
from latchkey.guards._grpc import CallRules, Presented, refusal, remaining
from latchkey.models import Scope

__all__ = ["GuardInterceptor"]

# How long a handler's thread waits for the event loop's decision. Only an event loop that hangs
# takes that long, because the verify has a far shorter deadline.
THREAD_WAIT_SECONDS: Final = 30.0

# Handlers, messages and contexts belong to the guarded service and have any type.
# Quoted, because the class has no type parameters at run time.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class GuardInterceptor(grpc.aio.ServerInterceptor):
    """Lets a call in if its bearer token is valid for the scope that the method requires.

    `required_scope` applies to every method, `scopes` to individual methods by their full name
    ("/pkg.Service/Method"). None accepts any valid token. Methods whose name is exactly in `public`
    need no token, nor do the methods of the services in `public_services`, such as
    "grpc.health.v1.Health".
    `api_key_header` names a metadata key, such as "x-api-key", in which callers may send the token
    instead. In the same way as scopes, `required_permissions` and `permissions` require permissions
    of the form `resource:action`. Tokens may be limited to networks. The client's address is that
    of the connection. Behind proxies, name their networks as `trusted_proxies`; the address is then
    the last one in x-forwarded-for that is not a trusted proxy.

    All other calls, including those of methods that do not exist, are refused with UNAUTHENTICATED
    or PERMISSION_DENIED, or with UNAVAILABLE if Latchkey gives no safe answer.

    A handler finds the token with `latchkey.guards.current_token()`. The call's deadline bounds the
    verify. No request is parsed before its caller is let in. Place the guard before interceptors
    that should only work for valid callers. All interceptors look up the handler first.
    """

    def __init__(
        self,
        verifier: SupportsVerify,
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
        check_verifier(verifier, for_threads=False)
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
    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the method's handler, wrapped so that it runs only for valid tokens."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if self._rules.exempts(method):
            return handler
        presented = self._rules.presented(method, handler_call_details.invocation_metadata)
        judge = _Judge(self._verifier, self._rules, presented)
        if handler is None:
            return grpc.stream_stream_rpc_method_handler(_unimplemented(judge))
        return _guarded(handler, judge)


@dataclass(frozen=True, slots=True)
class _Judge:
    """Decides about one call."""

    verifier: SupportsVerify
    rules: CallRules
    presented: Presented

    async def __call__(self, context: Any) -> Decision:
        return await decide(
            self.verifier,
            self.presented.authorization,
            self.presented.required_scope,
            remaining(context),
            api_keys=self.presented.api_keys,
            client_address=self.rules.client_address(self.presented, context),
            permissions=self.presented.permissions,
            traceparent=self.presented.traceparent,
        )

    def nowait(self, context: Any) -> Decision | None:
        return decide_nowait(
            self.verifier,
            self.presented.authorization,
            self.presented.required_scope,
            api_keys=self.presented.api_keys,
            client_address=self.rules.client_address(self.presented, context),
            permissions=self.presented.permissions,
        )


def _guarded(handler: Handler, judge: _Judge) -> Handler:
    """Return `handler` behind `judge`: the same kind of handler, sync or async as before."""
    deserializer, parse = None, handler.request_deserializer or _as_is
    if handler.request_streaming:
        # A stream is parsed as it is read, and the handler may read it through its context.
        deserializer, parse = handler.request_deserializer, _as_is
    serializer = handler.response_serializer
    if handler.response_streaming:
        behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
        make_streaming: Any = (
            grpc.stream_stream_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_stream_rpc_method_handler
        )
        made = make_streaming(_streaming(behaviour, parse, judge), deserializer, serializer)
    else:
        behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary
        make_unary: Any = (
            grpc.stream_unary_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        made = make_unary(_unary(behaviour, parse, judge), deserializer, serializer)
    guarded: Handler = made
    return guarded


# In each wrapper the service's code runs only in the branch for ALLOWED. Even if abort() returned,
# nothing would run. grpc.aio creates a task for each call. All code of the call, including
# generators, sees what is set in that task's context, and no other call does.


def _unary(behaviour: Any, parse: Callable[[Any], Any], judge: _Judge) -> Any:
    if inspect.iscoroutinefunction(behaviour):

        async def run(request: Any, context: Any) -> Any:
            decision = await judge(context)
            if decision.outcome is Outcome.ALLOWED:
                token_var.set(decision.token)
                return await behaviour(parse(request), context)
            return await context.abort(*refusal(decision))

        return run

    loop = asyncio.get_running_loop()

    def run_in_thread(request: Any, context: Any) -> Any:
        decision = _judge_from_thread(judge, context, loop)
        if decision.outcome is Outcome.ALLOWED:
            # Other calls reuse this thread, so run in a separate context instead of the thread's.
            own = contextvars.copy_context()
            own.run(token_var.set, decision.token)
            return own.run(behaviour, parse(request), context)
        return context.abort(*refusal(decision))

    return run_in_thread


def _streaming(behaviour: Any, parse: Callable[[Any], Any], judge: _Judge) -> Any:
    if inspect.isasyncgenfunction(behaviour):

        async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
            decision = await judge(context)
            if decision.outcome is Outcome.ALLOWED:
                token_var.set(decision.token)
                async with aclosing(behaviour(parse(request), context)) as responses:
                    async for response in responses:
                        yield response
            else:
                await context.abort(*refusal(decision))

        return generate

    if inspect.iscoroutinefunction(behaviour):
        # Such a handler reads and writes through its context, and returns nothing.
        return _unary(behaviour, parse, judge)

    loop = asyncio.get_running_loop()

    def generate_in_thread(request: Any, context: Any) -> Iterator[Any]:
        decision = _judge_from_thread(judge, context, loop)
        if decision.outcome is Outcome.ALLOWED:
            own = contextvars.copy_context()
            own.run(token_var.set, decision.token)
            responses = own.run(lambda: iter(behaviour(parse(request), context)))
            end = object()
            while (response := own.run(next, responses, end)) is not end:
                yield response
        else:
            context.abort(*refusal(decision))

    return generate_in_thread


def _unimplemented(judge: _Judge) -> Any:
    """Return the handler for an unknown method. Only valid callers learn that it is unknown."""

    async def run(_requests: Any, context: Any) -> None:
        decision = await judge(context)
        if decision.outcome is Outcome.ALLOWED:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        await context.abort(*refusal(decision))

    return run


def _judge_from_thread(judge: _Judge, context: Any, loop: asyncio.AbstractEventLoop) -> Decision:
    """Judge a call in a sync handler's thread: at once, or by waiting for the event loop."""
    decision = judge.nowait(context)
    if decision is not None:
        return decision

    async def on_loop() -> Decision:
        return await judge(context)

    future = asyncio.run_coroutine_threadsafe(on_loop(), loop)
    try:
        return future.result(THREAD_WAIT_SECONDS)
    except (TimeoutError, FutureCancelledError):
        future.cancel()
        return Decision(Outcome.UNAVAILABLE)


def _as_is(message: Any) -> Any:
    return message
