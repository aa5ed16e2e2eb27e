"""Hand-made HTTP/2 frames that no client library sends, and what the log says about them."""

from pathlib import Path

import pytest
from latchkey_service.access.credentials import mint

from tests.fuzz.frames import VERIFY
from tests.helpers import raw_http2 as http2
from tests.helpers.captured_log import everything_logged
from tests.helpers.raw_http2 import Frame, connected
from tests.helpers.service_process import PYTHON, service

# The stray byte at the end makes it invalid UTF-8.
CREDENTIAL = mint(lambda size: bytes(range(size))).reveal()


@pytest.fixture
def logs():
    """Everything that the process logs, except debug lines from the libraries of the test
    itself."""
    with everything_logged("json", "info") as written:
        yield written


async def send(address: str, *sent: Frame) -> list[Frame]:
    """Send frames on a new connection; return all frames up to the end of a stream or of the
    connection."""
    async with connected(address) as connection:
        return await connection.exchange(*sent)


def call(path: str = VERIFY, **headers: str) -> tuple[Frame, ...]:
    """Return the frames of a call."""
    block = http2.headers(path, *headers.items())
    return (
        Frame(http2.SETTINGS, 0, 0, b""),
        Frame(http2.HEADERS, http2.END_HEADERS, 1, block),
        Frame(http2.DATA, http2.END_STREAM, 1, http2.message(b"")),
    )


async def test_invalid_utf8_is_not_logged(address, logs):
    """A credential or path that contains a byte outside UTF-8 does not appear in any log line."""
    assert await send(address, *call(authorization=f"Bearer {CREDENTIAL}\xff"))
    assert await send(address, *call(path=f"/{CREDENTIAL}\xff"))
    written = logs.getvalue()
    assert CREDENTIAL[4:40] not in written
    if "grpc" in written:
        assert "UnicodeDecodeError" in written, "the failure is logged"


async def test_rejected_frames_do_not_fill_the_log(tmp_path: Path, database_url: str):
    """A client cannot fill the log with frames that never reach a handler."""
    # Started as users start it: what gRPC logs depends on the environment that a worker gets.
    with service(
        tmp_path / "service",
        PYTHON,
        data_dir=tmp_path / "data",
        database_url=database_url,
        listen="127.0.0.1:0",
        transport="grpcio",
        log_format="json",
    ) as running:
        address = await running.welcome()
        goaway = Frame(http2.GOAWAY, 0, 0, b"\0\0\0\0\0\0\0\x08nonsense")
        settings, *others = call()
        # The server reads the frames of a connection in order: once it answers the call, it has
        # read all frames before it.
        await send(address, settings, *[goaway] * 100, *others)
        assert await running.end() == 0
        assert "nonsense" not in running.err
