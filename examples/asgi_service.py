"""An ASGI application that lets in only requests with a valid token.

Run it in one terminal, and call it in another:

    uvicorn --app-dir examples asgi_service:app
    curl -i -H @- http://127.0.0.1:8000/orders <<<"Authorization: Bearer $SECRET"
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from latchkey import Verifier
from latchkey.guards import current_token
from latchkey.guards.asgi import GuardMiddleware
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

verifier = Verifier(os.environ.get("LATCHKEY_TARGET", "127.0.0.1:50051"))


async def orders(_request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"orders of {current_token().account_id}\n")


async def healthz(_request: Request) -> PlainTextResponse:
    return PlainTextResponse("ok\n")


@asynccontextmanager
async def lifespan(_app: Starlette) -> AsyncIterator[None]:
    async with verifier:
        yield


# GET, HEAD and OPTIONS need the scope READ, all other methods WRITE.
guard = Middleware(GuardMiddleware, verifier=verifier, public={"/healthz"}, realm="shop")
app = Starlette(
    routes=[
        Route("/orders", orders, methods=["GET", "POST"]),
        Route("/healthz", healthz),
    ],
    middleware=[guard],
    lifespan=lifespan,
)
