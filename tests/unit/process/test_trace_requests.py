"""Why the collector did not accept spans."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator

import pytest
import requests
from latchkey_service.process.trace_requests import Requests

from tests.helpers.trace_collector import collecting

SECRET = {"authorization": "Bearer canary"}


async def cause(url: str, seconds: float = 5) -> str:
    """Send a request as the exporter does, and return why it failed."""
    observed = Requests()
    session = observed.session
    assert session is not None

    def send() -> None:
        with contextlib.suppress(requests.RequestException, OSError):
            session.request(
                method="POST",
                url=f"{url}/v1/traces",
                headers=SECRET,
                data=b"",
                timeout=seconds,
                allow_redirects=False,
            )

    await asyncio.to_thread(send)
    assert "canary" not in observed.cause
    assert "127.0.0.1" not in observed.cause
    return observed.cause


@contextlib.asynccontextmanager
async def closing() -> AsyncIterator[str]:
    """Run a server that closes each connection after the request."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_nobody_listens() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert await cause(f"http://127.0.0.1:{bound.getsockname()[1]}") == "connection refused"


@pytest.mark.parametrize(
    ("status", "expected"),
    [(401, "HTTP 401 Unauthorized"), (503, "HTTP 503 Service Unavailable"), (599, "HTTP 599")],
)
async def test_the_collector_refuses(status: int, expected: str) -> None:
    """The status is named, and not the text of the answer."""
    async with collecting() as collector:
        collector.status = status
        assert await cause(collector.url) == expected
        collector.status = 200
        assert await cause(collector.url) == ""


async def test_the_collector_hangs() -> None:
    async with collecting() as collector:
        collector.gate = asyncio.Event()
        assert await cause(collector.url, seconds=0.2) == "timed out"
        collector.gate.set()


async def test_the_connection_closes() -> None:
    async with closing() as url:
        assert await cause(url) == "connection closed"


async def test_the_collector_has_no_tls() -> None:
    """A collector that expects plaintext answers a TLS handshake with text."""
    async with closing() as url:
        assert (await cause(url.replace("http", "https"), seconds=1)) in {
            "TLS: wrong version number",
            "TLS: record layer failure",
            "connection closed",
            "timed out",
        }


def raised(error: Exception) -> str:
    """Return the cause of a request that ends with this error."""
    observed = Requests()
    session = observed.session
    assert session is not None

    class Adapter(requests.adapters.HTTPAdapter):
        def send(self, *_: object, **__: object) -> requests.Response:
            raise error

    session.mount("http://", Adapter())
    with contextlib.suppress(Exception):
        session.request("POST", "http://collector/canary", headers=SECRET)
    return observed.cause


def test_errors_that_others_wrap() -> None:
    """The innermost cause is named, however the libraries wrap it."""
    expired = ssl.SSLCertVerificationError(1, "canary")
    expired.verify_message = "certificate has expired"
    wrapped = requests.exceptions.SSLError(OSError("canary", expired))
    assert raised(wrapped) == "TLS: certificate has expired"
    plain = ssl.SSLError(1, "canary")
    plain.reason = "WRONG_VERSION_NUMBER"
    assert raised(requests.exceptions.SSLError(plain)) == "TLS: wrong version number"
    unknown = socket.gaierror(-2, "canary")
    assert raised(requests.ConnectionError(unknown)) == "the host name is not known"
    assert raised(requests.exceptions.ProxyError("canary")) == "the proxy does not forward"
    assert raised(OSError("canary: no such file")) == "a TLS file cannot be read"
    assert raised(requests.exceptions.InvalidURL("canary")) == "InvalidURL"


def test_a_cycle_of_errors_ends() -> None:
    """Errors that name each other do not hold up the thread of the exporter."""
    one, two = ValueError("canary"), ValueError("canary")
    one.__cause__, two.__cause__ = two, one
    assert raised(one) == "ValueError"


def test_a_credential_provider_keeps_its_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter then needs the session that the provider makes."""
    monkeypatch.setenv("OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER", "cloud")
    assert Requests().session is None
