"""Which TLS versions the entry points accept from a server, each started as users start it."""

import asyncio
import base64
import json
import os
import re
import signal
import ssl
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.helpers.callers import write_server_files
from tests.helpers.waiting import WAIT_SECONDS, eventually

KEY = ec.generate_private_key(ec.SECP256R1())
REPORT = json.dumps([{"token": "lk_" + "A" * 57, "type": "latchkey", "url": ""}]).encode()


class Entry(NamedTuple):
    """A program that serves HTTP and asks Latchkey when somebody asks it."""

    arguments: tuple[str, ...]
    ask: Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]
    environment: tuple[tuple[str, str], ...] = ()


async def page(client: httpx.AsyncClient) -> httpx.Response:
    return await client.get("/")


async def report(client: httpx.AsyncClient) -> httpx.Response:
    signature = base64.b64encode(KEY.sign(REPORT, ec.ECDSA(SHA256()))).decode()
    headers = {
        "github-public-key-identifier": "k",
        "github-public-key-signature": signature,
        "content-type": "application/json",
    }
    return await client.post("/", content=REPORT, headers=headers)


ENTRIES = {
    "console": Entry(
        ("latchkey_cli", "console", "--account", "acme", "--listen", "127.0.0.1:0"), page
    ),
    "receiver": Entry(
        ("latchkey_cli", "receiver", "--keys-file", "keys.json", "--listen", "127.0.0.1:0"),
        report,
    ),
    "make console": Entry(
        ("latchkey_console.together", "acme"), page, (("LATCHKEY_CONSOLE_LISTEN", "127.0.0.1:0"),)
    ),
}


def keys() -> str:
    key = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    entry = {"key_identifier": "k", "key": key, "is_current": True}
    return json.dumps({"public_keys": [entry]})


def environment(folder: Path, target: str) -> dict[str, str]:
    """Return a user's environment, without anything that the test process has set for itself."""
    return {
        "PATH": os.defpath,
        "HOME": str(folder),
        "LANG": "C.UTF-8",
        "LATCHKEY_TARGET": target,
        # Where `make console` looks for a service that is already running.
        "LATCHKEY_LISTEN": target,
        "LATCHKEY_TLS_CA": "clients.pem",
    }


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("name", ENTRIES)
async def test_long_running_programs_use_only_tls_1_3(
    tmp_path: Path, name: str, version: ssl.TLSVersion
) -> None:
    """The console, the receiver, and the console of `make console` complete no handshake with a
    server that offers only TLS 1.2, and one with a server that offers only TLS 1.3."""
    files = write_server_files(tmp_path)
    (tmp_path / "keys.json").write_text(keys())
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(files["tls_certificate"], files["tls_key"])
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    handshakes: list[str] = []

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handshakes.append(writer.get_extra_info("ssl_object").version())
        writer.close()

    entry = ENTRIES[name]
    async with await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context) as server:
        target = f"localhost:{server.sockets[0].getsockname()[1]}"
        module, *arguments = entry.arguments
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=tmp_path,
            env=environment(tmp_path, target) | dict(entry.environment),
        )
        try:
            url = await address(process)
            async with httpx.AsyncClient(timeout=WAIT_SECONDS) as client:
                client.base_url = httpx.URL(url)
                answer = await entry.ask(client)
            # Its call fails, because nobody speaks HTTP/2 behind the handshake.
            assert answer.status_code >= 500, answer.text
            if version is ssl.TLSVersion.TLSv1_3:
                await eventually(lambda: "TLSv1.3" in handshakes, "a handshake")
        finally:
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(WAIT_SECONDS):
                await process.communicate()
    assert set(handshakes) == ({"TLSv1.3"} if version is ssl.TLSVersion.TLSv1_3 else set())


async def address(process: asyncio.subprocess.Process) -> str:
    """Wait until the program serves, and return its URL."""
    assert process.stdout is not None
    said = b""
    async with asyncio.timeout(WAIT_SECONDS):
        while (found := re.search(rb"http://127\.0\.0\.1:[1-9]\d*", said)) is None:
            chunk = await process.stdout.read(4_096)
            assert chunk, f"it ended: {said.decode()}"
            said += chunk
    return found[0].decode()


@pytest.mark.parametrize(
    "module", ["latchkey_cli.main", "latchkey_cli.session", "latchkey_console.together"]
)
async def test_grpc_is_prepared_before_it_is_loaded(module: str) -> None:
    """Whichever module comes first, the variables that gRPC reads once are set before it loads."""
    program = f"""
import os, sys
class Look:
    def find_spec(self, name, *_):
        if name == "grpc":
            print(os.environ.get("GRPC_SSL_CIPHER_SUITES"))
sys.meta_path.insert(0, Look())
import {module}
import grpc
"""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program),
        stdout=asyncio.subprocess.PIPE,
        env={"PATH": os.defpath},
    )
    async with asyncio.timeout(WAIT_SECONDS):
        out, _ = await process.communicate()
    assert out.decode().split() == ["ECDHE-PSK-AES128-CBC-SHA"]
