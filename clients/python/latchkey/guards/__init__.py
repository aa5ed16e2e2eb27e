"""Guards for your own service: who presents no valid token does not get in.

`latchkey.guards.grpc.GuardInterceptor` is for grpc.aio servers, `latchkey.guards.asgi.
GuardMiddleware` for ASGI applications. Neither is imported here, so each costs only its users.
"""

from latchkey.guards._decision import current_token

__all__ = ["current_token"]
