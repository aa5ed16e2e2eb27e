"""A FastAPI application whose routes need a token. /docs shows the padlock and the scopes.

Run it in one terminal, and call it in another:

    uvicorn --app-dir examples fastapi_service:app
    curl -i -H @- http://127.0.0.1:8000/orders <<<"Authorization: Bearer $SECRET"
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI
from latchkey import Scope, Token, Verifier
from latchkey.guards.fastapi import Guard

verifier = Verifier(os.environ.get("LATCHKEY_TARGET", "127.0.0.1:50051"))
require = Guard(verifier, realm="shop")
Reader = Annotated[Token, Depends(require(Scope.READ))]
Writer = Annotated[Token, Depends(require(Scope.WRITE))]


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    async with verifier:
        yield


app = FastAPI(title="Shop", lifespan=lifespan)


@app.get("/orders")
async def orders(token: Reader) -> str:
    return f"orders of {token.account_id}"


@app.post("/orders", status_code=201)
async def place(token: Writer) -> str:
    return f"placed for {token.account_id}"


@app.get("/healthz")
async def healthz() -> str:
    return "ok"
