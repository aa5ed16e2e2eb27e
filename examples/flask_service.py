"""A Flask application that lets in only requests with a valid token.

    flask --app examples/flask_service.py run --port 8000
    curl -i -H @- http://127.0.0.1:8000/orders <<<"Authorization: Bearer $SECRET"

In production: gunicorn --chdir examples --threads 8 flask_service:app
"""

import os
from typing import Any

from flask import Flask
from latchkey.guards import current_token
from latchkey.guards.wsgi import GuardMiddleware
from latchkey.sync import Verifier

app = Flask(__name__)


@app.route("/orders", methods=["GET", "POST"])
def orders() -> str:
    return f"orders of {current_token().account_id}\n"


@app.get("/healthz")
def healthz() -> str:
    return "ok\n"


# The verifier's thread starts with the first request, so servers such as gunicorn may fork before
# that.
verifier = Verifier(os.environ.get("LATCHKEY_TARGET", "127.0.0.1:50051"))
# GET, HEAD and OPTIONS need the scope READ, all other methods WRITE.
guarded: Any = GuardMiddleware(app.wsgi_app, verifier, public={"/healthz"}, realm="shop")
app.wsgi_app = guarded  # type: ignore[method-assign]  # as Flask's documentation does it
