"""What starting the products has in common: processes, their JSON APIs, and protobuf by hand."""

import contextlib
import hashlib
import http.client
import json
import os
import secrets
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tests.benchmarks import processes
from tests.benchmarks.peers.programs import Unavailable

__all__ = ["Api", "chunks", "digest", "http_form", "message", "migrated", "served", "text"]

# OpenFGA accepts no more per call.
WRITE_MAX = 100
# The migrations of the largest product take half a minute on a busy machine.
MIGRATE_SECONDS_MAX = 180.0
START_SECONDS_MAX = 60.0
POLL_SECONDS = 0.1
CALL_SECONDS_MAX = 20.0


class Api:
    """A JSON API on loopback. Raises RuntimeError for an answer that reports a failure."""

    def __init__(self, address: str, headers: Mapping[str, str] | None = None) -> None:
        self._address = address
        self._headers = dict(headers or {})

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._call("POST", path, json.dumps(body), "application/json")

    def form(self, path: str, fields: Mapping[str, str]) -> Any:
        return self._call("POST", path, urlencode(fields), "application/x-www-form-urlencoded")

    def wait(self, path: str, pid: int) -> None:
        """Wait until the server answers on `path`."""
        give_up = time.monotonic() + START_SECONDS_MAX
        while True:
            try:
                self._call("GET", path, None, "application/json")
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                if time.monotonic() > give_up or not Path(f"/proc/{pid}").exists():
                    raise Unavailable(f"it does not answer on {path}: {error}") from error
                time.sleep(POLL_SECONDS)
            else:
                return

    def _call(self, method: str, path: str, body: str | None, kind: str) -> Any:
        connection = http.client.HTTPConnection(self._address, timeout=CALL_SECONDS_MAX)
        try:
            connection.request(method, path, body, self._headers | {"Content-Type": kind})
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        if not 200 <= answer.status < 300:
            raise RuntimeError(f"{method} {path}: {answer.status} {text[:500]!r}")
        return json.loads(text) if text.strip() else None


@contextlib.contextmanager
def served(
    scratch: Path, name: str, argv: Sequence[str], environment: Mapping[str, str], core: int
) -> Iterator[int]:
    """Run a server on one core; yield its pid, and end it."""
    log = scratch / f"{name.replace(' ', '-')}.log"
    with log.open("wb") as out, processes.on({core}):
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=scratch,
            env=dict(os.environ) | dict(environment),
            start_new_session=True,
            preexec_fn=processes.end_with_parent(),  # noqa: PLW1509 - only makes a system call
        )
    try:
        yield process.pid
    finally:
        process.terminate()
        processes.ended(process)


def migrated(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(
        argv,
        env=dict(os.environ) | dict(environment or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=MIGRATE_SECONDS_MAX,
        check=False,
    )
    if done.returncode:
        raise Unavailable(f"its migrations failed: {(done.stdout + done.stderr)[-500:]}")


def chunks(items: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), WRITE_MAX):
        yield items[start : start + WRITE_MAX]


def digest() -> str:
    return hashlib.sha256(secrets.token_bytes(16)).hexdigest()


def message(number: int, content: bytes) -> bytes:
    """Return a field of a protobuf message that holds bytes, of at most 16,383 bytes."""
    size = len(content)
    length = bytes([size]) if size < 0x80 else bytes([size & 0x7F | 0x80, size >> 7])
    return bytes([number << 3 | 2]) + length + content


def text(number: int, text: str) -> bytes:
    return message(number, text.encode())


def http_form(address: str, path: str, fields: Mapping[str, str]) -> bytes:
    body = urlencode(fields)
    return (
        f"POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Length: {len(body)}\r\n"
        f"Content-Type: application/x-www-form-urlencoded\r\n\r\n{body}"
    ).encode()
