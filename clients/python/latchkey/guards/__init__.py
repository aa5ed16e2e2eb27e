"""Guards reject requests to your own service that carry no valid bearer token.

`latchkey.guards.grpc.GuardInterceptor` is for grpc.aio servers, and
`latchkey.guards.asgi.GuardMiddleware` for ASGI applications. This package imports neither, so that
each costs only its users.
"""

from latchkey.guards._decision import current_token

__all__ = ["current_token"]
