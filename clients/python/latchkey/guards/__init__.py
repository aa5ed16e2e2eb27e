"""Guards reject requests to your own service that carry no valid bearer token.

| module | for |
| --- | --- |
| `asgi` | any ASGI application |
| `fastapi` | individual routes of a FastAPI application, with the padlock in its documentation |
| `wsgi` | any WSGI application, such as Flask |
| `django` | Django: a middleware, and a decorator for views |
| `drf` | Django REST framework: an authentication class and a permission class |
| `grpc` | grpc.aio servers |
| `grpc_sync` | grpc servers with threads |

This package imports none of them, so that each costs only its users. All share one decision.
"""

from latchkey.guards._decision import current_token, current_token_or_none

__all__ = ["current_token", "current_token_or_none"]
