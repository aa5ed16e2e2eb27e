"""A worker that has stopped exits, although DNS look-ups of it hang."""

import asyncio
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from latchkey_service.process import worker

from tests.helpers.repository import ROOT
from tests.helpers.waiting import WAIT_SECONDS

# Look-ups hang for longer than a test waits: the only server of names never answers.
RESOLVER = "nameserver 127.0.0.1\noptions timeout:30 attempts:5\n"
NAMESPACE = (
    *("unshare", "--net", "--mount", "--map-root-user", "sh", "-c"),
    'ip link set lo up && mount --bind "$1" /etc/resolv.conf && shift && exec "$@"',
    "sh",
)
LOOKUPS = 6
CODE = 3


def test_hanging_look_ups_do_not_keep_a_worker(tmp_path: Path) -> None:
    """A worker whose work has ended exits with its code, although look-ups hang: those of its event
    loop, and those in a thread of it."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        pytest.skip("needs unshare and ip")
    resolver = tmp_path / "resolv.conf"
    resolver.write_text(RESOLVER)
    prefix = (*NAMESPACE, str(resolver))
    if subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system does not allow namespaces")
    began = time.monotonic()
    done = subprocess.run(
        [*prefix, sys.executable, "-m", __name__],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
    )
    assert done.returncode == CODE, done.stderr
    assert time.monotonic() - began < WAIT_SECONDS


async def look_up() -> int:
    """Begin look-ups that hang, and end."""
    loop = asyncio.get_running_loop()
    tasks = [
        loop.create_task(loop.create_connection(asyncio.Protocol, f"db{number}.example", 5432))
        for number in range(LOOKUPS)
    ]
    loop.run_in_executor(None, socket.getaddrinfo, "db.example", 5432)
    done, _ = await asyncio.wait(tasks, timeout=0.5)
    assert not done, "the look-ups hang"
    return CODE


if __name__ == "__main__":
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 53))
    worker._run = look_up
    sys.exit(worker.main())
