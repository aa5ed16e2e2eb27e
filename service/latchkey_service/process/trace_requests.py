"""Observes the requests to the collector of traces, to say why one failed.

The exporter reports only that a batch failed. Its session is the public place where the status or
the error of each request can be seen. A cause never contains the URL, a header, or a text that the
collector sent, because each can contain a credential.
"""

import http
import os
import socket
import ssl
from collections.abc import Iterator
from typing import Any, Final

import requests

from latchkey_service.settings.traces import PROVIDERS

__all__ = ["Requests"]

# Errors of libraries wrap each other a few times. Bounded, because they may form a cycle.
_WRAPPED_MAX: Final = 20
# The first kind that is among the wrapped errors counts, so specific ones precede general ones.
_CAUSES: Final[tuple[tuple[tuple[type[BaseException], ...], str], ...]] = (
    ((requests.exceptions.ProxyError,), "the proxy does not forward"),
    ((socket.gaierror,), "the host name is not known"),
    ((ConnectionRefusedError,), "connection refused"),
    ((requests.Timeout, TimeoutError), "timed out"),
    ((ConnectionError,), "connection closed"),
)


class Requests:
    """Has the `session` of the exporter, and the `cause` of its last failed request, or ""."""

    def __init__(self) -> None:
        self.cause = ""
        self.session: requests.Session | None = None
        # A provider has another kind of session, which the exporter makes.
        if not any(os.environ.get(name) for name in PROVIDERS):
            self.session = _Session(self)


class _Session(requests.Session):
    def __init__(self, observer: Requests) -> None:
        super().__init__()
        self._observer = observer

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        """Send a request, and note why it failed."""
        try:
            response = super().request(*args, **kwargs)
        except Exception as error:
            self._observer.cause = _cause(error)
            raise
        self._observer.cause = "" if response.ok else _status(response.status_code)
        return response


def _status(code: int) -> str:
    try:
        return f"HTTP {code} {http.HTTPStatus(code).phrase}"
    except ValueError:
        return f"HTTP {code}"


def _cause(error: BaseException) -> str:
    """Return why a request failed, in a few words."""
    wrapped = list(_wrapped(error))
    for each in wrapped:
        if isinstance(each, ssl.SSLError):
            return f"TLS: {_tls_reason(each)}"
    for kinds, cause in _CAUSES:
        if any(isinstance(each, kinds) for each in wrapped):
            return cause
    if isinstance(error, OSError) and not isinstance(error, requests.RequestException):
        return "a TLS file cannot be read"
    return type(error).__name__


def _tls_reason(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        # OpenSSL's text for the code, such as "certificate has expired".
        return error.verify_message
    return (error.reason or "failed").lower().replace("_", " ")


def _wrapped(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and those that it wraps, the outermost first."""
    queue: list[object] = [error]
    for _ in range(_WRAPPED_MAX):
        if not queue:
            return
        each = queue.pop(0)
        if isinstance(each, BaseException):
            yield each
            # `reason` is where urllib3 keeps the last error of several tries.
            queue += [*each.args, getattr(each, "reason", None), each.__cause__, each.__context__]
