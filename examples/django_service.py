"""A Django project in one file whose views need a token.

    python examples/django_service.py runserver 8000
    curl -i -H @- http://127.0.0.1:8000/orders <<<"Authorization: Bearer $SECRET"

In production: gunicorn --chdir examples --threads 8 django_service:app
"""

import os
import sys

from django.conf import settings
from django.core.management import execute_from_command_line
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path
from latchkey import Scope
from latchkey.guards import current_token
from latchkey.guards.django import require
from latchkey.sync import Verifier

if not settings.configured:
    settings.configure(
        ALLOWED_HOSTS=["127.0.0.1", "localhost"],
        ROOT_URLCONF=__name__,
        MIDDLEWARE=["latchkey.guards.django.GuardMiddleware"],
        LATCHKEY={
            "VERIFIER": Verifier(os.environ.get("LATCHKEY_TARGET", "127.0.0.1:50051")),
            # Without this, GET, HEAD and OPTIONS need the scope READ, and all other methods WRITE.
            "REQUIRED_SCOPE": Scope.READ,
            "PUBLIC": {"/healthz"},
            "REALM": "shop",
        },
    )


def orders(_request: HttpRequest) -> HttpResponse:
    return HttpResponse(f"orders of {current_token().account_id}\n")


@require(Scope.WRITE)
def refunds(_request: HttpRequest) -> HttpResponse:
    return HttpResponse(f"refunds of {current_token().account_id}\n")


def healthz(_request: HttpRequest) -> HttpResponse:
    return HttpResponse("ok\n")


urlpatterns = [path("orders", orders), path("refunds", refunds), path("healthz", healthz)]
app = get_wsgi_application()

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
