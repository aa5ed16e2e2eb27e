"""Policy, certificates and listeners of `python -m latchkey_service` as a process."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import ssl
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import trustme
from cryptography import x509
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.helpers.callers import (
    CALLERS,
    Identity,
    authority,
    ca_pem,
    channel_credentials,
    credential,
    dns_identity,
    made,
    policy_text,
    spiffe_identity,
    uri,
    write_server_files,
)
from tests.helpers.calls import CHANNEL_OPTIONS, is_serving, outcome
from tests.helpers.free_ports import free_port
from tests.helpers.held_workers import Hold
from tests.helpers.repository import ROOT
from tests.helpers.scratch import SCRATCH
from tests.helpers.service_process import PYTHON, Service
from tests.helpers.waiting import WAIT_SECONDS, eventually
from tests.helpers.watch_client import WatchClient

Run = Callable[..., Service]
WITHOUT_VERIFIER = policy_text([name for name in CALLERS if name != "verifier"])
BROKEN = '[callers.a]\nroles = ["wizard"]\n'
UNKNOWN_SECRET = pb.VerifyRequest(secret="nothing")


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="latchkey-test-", dir=SCRATCH))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def run(folder: Path, database_url: str) -> Iterator[Run]:
    """Start services on a database; the fixture stops them."""
    started: list[Service] = []

    def run(*python: str, **settings: object) -> Service:
        given: dict[str, object] = {
            "listen": "127.0.0.1:0",
            "database_url": database_url,
            "data_dir": folder / "data",
            "grace_seconds": 0.5,
        }
        name = f"service {len(started)}"
        started.append(Service(folder / name, python or None, **(given | settings)))
        return started[-1]

    yield run
    for service in started:
        service.clean_up()


@pytest.fixture
def policy(folder: Path) -> Path:
    path = folder / "policy.toml"
    path.write_text(policy_text())
    return path


def encrypted(
    target: str, name: str = "verifier"
) -> contextlib.AbstractAsyncContextManager[grpc.aio.Channel]:
    return secured(target, spiffe_identity(uri(name)))


@contextlib.asynccontextmanager
async def secured(target: str, identity: Identity) -> AsyncIterator[grpc.aio.Channel]:
    credentials = channel_credentials(identity)
    async with grpc.aio.secure_channel(target, credentials, options=CHANNEL_OPTIONS) as channel:
        await eventually(lambda: is_serving(channel), "health is up")
        yield channel


async def verify(channel: grpc.aio.Channel, name: str | None = None) -> grpc.StatusCode:
    metadata = (("authorization", f"Bearer {credential(name)}"),) if name else ()
    stub = pb_grpc.TokenServiceStub(channel)
    return (await outcome(stub.Verify(UNKNOWN_SECRET, timeout=2, metadata=metadata))).code


def write(path: Path, text: str) -> None:
    """Replace a file atomically, with a rename."""
    other = path.with_suffix(".new")
    other.write_text(text)
    other.replace(path)


def logged(service: Service, event: str) -> list[dict[str, Any]]:
    """Return the log lines about this."""
    return [line for line in service.log if line["event"] == event]


async def kill_and_await_successor(service: Service, pid: int) -> None:
    """Kill a worker and wait for its successor."""
    before = len(service.worker_pids)
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: len(service.worker_pids) > before, "a new worker")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"listen": "0.0.0.0:0"}, "LATCHKEY_POLICY"),
        ({"policy": "nowhere.toml"}, "LATCHKEY_POLICY: nowhere.toml: cannot be read"),
        ({"policy": "broken.toml"}, "LATCHKEY_POLICY: broken.toml: callers.a.roles: "),
        (
            {"tls_listen": "localhost:0", "tls_certificate": "a", "tls_key": "a"},
            "LATCHKEY_TLS_CERTIFICATE: a: No such file",
        ),
        (
            {"tls_listen": "localhost:0", "tls_certificate": "broken.toml", "tls_key": "a"},
            "LATCHKEY_TLS_CERTIFICATE: broken.toml is not a PEM file",
        ),
        (
            {"tls_listen": "localhost:0", "tls_certificate": "server.pem", "tls_key": "other.key"},
            "LATCHKEY_TLS_KEY: other.key is not the key of LATCHKEY_TLS_CERTIFICATE",
        ),
        (
            {
                "tls_listen": "localhost:0",
                "tls_certificate": "server.pem",
                "tls_key": "server.key",
                "tls_client_ca": "server.key",
            },
            "LATCHKEY_TLS_CLIENT_CA: server.key contains no PEM certificates",
        ),
    ],
)
async def test_configuration_mistakes_stop_the_start(
    run: Run, folder: Path, settings: dict[str, object], named: str
) -> None:
    """A mistake in the configuration is reported at once, with the setting and the remedy."""
    where = folder / "service 0"
    where.mkdir()
    (where / "broken.toml").write_text('[callers.a]\nroles = ["wizard"]\n')
    write_server_files(where)
    (where / "other.key").write_bytes(dns_identity("other.internal").key)
    service = run(**settings)
    assert await service.ended() in (1, 2)
    assert named in service.err
    assert "Traceback" not in service.err


async def test_a_changed_policy_takes_effect_while_running(
    run: Run, folder: Path, policy: Path
) -> None:
    """All workers apply a changed policy automatically and on SIGHUP. An invalid one is reported
    and changes nothing. A restarted worker uses the same policy as the others, and
    not the one that was in force when the worker or the service first started."""
    service = run(policy=policy, workers=2)
    address = await service.welcome()
    await service.prints('-H "authorization: Bearer $(cat me.credential)"')
    async with contextlib.AsyncExitStack() as stack:
        # Enough connections to reach both workers almost certainly.
        channels = [
            await stack.enter_async_context(
                grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            )
            for _ in range(8)
        ]

        async def all_answer(code: grpc.StatusCode) -> bool:
            codes = [await verify(channel, "verifier") for channel in channels]
            return set(codes) == {code}

        await eventually(lambda: all_answer(grpc.StatusCode.OK), "all may call")
        write(policy, WITHOUT_VERIFIER)
        os.kill(service.pid, signal.SIGHUP)
        await eventually(
            lambda: all_answer(grpc.StatusCode.UNAUTHENTICATED), "no caller is allowed"
        )
        write(policy, policy_text())
        await eventually(lambda: all_answer(grpc.StatusCode.OK), "all may call again")
        write(policy, WITHOUT_VERIFIER)
        await eventually(
            lambda: all_answer(grpc.StatusCode.UNAUTHENTICATED), "no caller is allowed"
        )

        write(policy, BROKEN)
        os.kill(service.pid, signal.SIGHUP)

        await eventually(lambda: logged(service, "policy rejected"), "it says what is wrong")
        assert "callers.a.roles: " in logged(service, "policy rejected")[0]["error"]
        for pid in service.worker_pids[:2]:
            await kill_and_await_successor(service, pid)
        await eventually(
            lambda: all_answer(grpc.StatusCode.UNAUTHENTICATED), "no caller is allowed"
        )
        write(policy, policy_text())
        await eventually(lambda: all_answer(grpc.StatusCode.OK), "the new ones take a policy too")
    assert service.ended_with() is None
    assert credential("verifier") not in service.err + service.out


async def test_a_policy_that_changes_while_a_worker_starts(
    run: Run, folder: Path, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A permission that is removed after a worker was started and before it serves is removed in
    that worker too, even if the file is invalid by then."""
    hold = Hold(folder, monkeypatch)
    service = run(policy=policy, workers=2)
    address = await service.welcome()
    hold.on()
    os.kill(service.worker_pids[0], signal.SIGKILL)
    new = await hold.one(service)
    write(policy, WITHOUT_VERIFIER)
    await eventually(lambda: logged(service, "policy in force"), "the other worker has it")
    write(policy, BROKEN)
    await eventually(lambda: logged(service, "policy rejected"), "it says what is wrong")
    hold.off(new)
    await eventually(lambda: new.pid in service.worker_pids, "the new worker serves")

    async def answer() -> grpc.StatusCode:
        async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            return await verify(channel, "verifier")

    # Enough connections to reach both workers almost certainly.
    codes = await asyncio.gather(*(answer() for _ in range(16)))
    assert set(codes) == {grpc.StatusCode.UNAUTHENTICATED}


async def test_a_policy_that_changes_while_a_worker_stops(run: Run, policy: Path) -> None:
    """A permission that is removed while a worker stops is removed in that worker too, for as long
    as it answers calls."""
    service = run(policy=policy, lease_seconds=5, grace_seconds=10)
    address = await service.welcome()
    bearer = (("authorization", f"Bearer {credential('verifier')}"),)
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        assert await verify(channel, "manager") is grpc.StatusCode.PERMISSION_DENIED
        # The worker stays as long as a client has a lease.
        watcher = WatchClient(pb_grpc.TokenServiceStub(channel), bearer)
        await watcher.granted()
        os.kill(service.worker_pids[0], signal.SIGTERM)
        await eventually(lambda: is_not_serving(channel), "it stops")
        write(policy, policy_text([name for name in CALLERS if name != "manager"]))

        async def is_unknown() -> bool:
            return await verify(channel, "manager") is grpc.StatusCode.UNAUTHENTICATED

        await eventually(is_unknown, "the caller is unknown")
        assert len(service.worker_pids) == 1
        assert not logged(service, "worker exited")
        await watcher.say(released=True)


async def is_not_serving(channel: grpc.aio.Channel) -> bool:
    return not await is_serving(channel)


async def test_a_restarted_worker_has_the_settings_of_the_start(
    run: Run, folder: Path, database_url: str, policy: Path
) -> None:
    """The service reads `.env` only when it starts. A restarted worker neither loses its policy nor
    changes its address because of a later `.env`. No secret is on a command line or in the log."""
    where, port = folder / "service 0", free_port()
    where.mkdir()
    (where / ".env").write_text(f"LATCHKEY_POLICY={policy}\nLATCHKEY_SECRET_PREFIX=mine\n")
    later = {"TLS_LISTEN": f"localhost:{port}"} | {
        name.upper(): path for name, path in write_server_files(folder).items()
    }
    # Without dumps, only root may inspect its sockets.
    service = run(*PYTHON, core_dumps="on")
    address = await service.welcome()
    for text in (
        "".join(f"LATCHKEY_{name}={value}\n" for name, value in later.items()).encode(),
        b"\xff\n",
    ):
        (where / ".env").write_bytes(text)
        await kill_and_await_successor(service, service.worker_pids[-1])
        async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            await eventually(partial(is_serving, channel), "health is up")
            assert await verify(channel) is grpc.StatusCode.UNAUTHENTICATED
            assert await verify(channel, "verifier") is grpc.StatusCode.OK
            name = f"token {len(service.worker_pids)}"
            request = pb.CreateRequest(account_id="acme", name=name, scope=pb.SCOPE_READ)
            metadata = (("authorization", f"Bearer {credential('manager')}"),)
            create = pb_grpc.TokenServiceStub(channel).Create
            created = await create(request, timeout=5, metadata=metadata)
            assert created.secret.startswith("mine_")
        worker = psutil.Process(service.worker_pids[-1])
        assert port not in {c.laddr.port for c in worker.net_connections("tcp") if c.laddr}
        assert database_url not in " ".join(worker.cmdline())
    assert database_url not in service.err + service.out


async def test_tls(run: Run, folder: Path, policy: Path) -> None:
    """Several workers serve TLS 1.3 only on one address, beside the plaintext one. New connections
    use changed files, and old connections stay open. Files that do not match are rejected until
    they do. Text around certificates is ignored, including in the CA bundle, which the test
    replaces."""
    files = write_server_files(folder)
    comment = "# Főtanúsítvány\n".encode()
    for name in files:
        files[name].write_bytes(comment + files[name].read_bytes())
    port = free_port()
    target = f"localhost:{port}"
    service = run(*PYTHON, policy=policy, tls_listen=target, workers=2, **files)
    address = await service.welcome()
    await service.prints(f"With TLS it serves on {target}.")
    async with encrypted(target) as first:
        assert await verify(first) is grpc.StatusCode.OK
        async with grpc.aio.insecure_channel(address) as plaintext:
            assert await verify(plaintext) is grpc.StatusCode.UNAUTHENTICATED
            assert await verify(plaintext, "verifier") is grpc.StatusCode.OK
        assert await handshake(port, ssl.TLSVersion.TLSv1_3) is not None
        assert await handshake(port, ssl.TLSVersion.TLSv1_2) is None

        if shutil.which("openssl"):
            assert await openssl_version(port, "-tls1_3") == "TLSv1.3"
            assert await openssl_version(port, "-tls1_2") is None

        before = await handshake(port, ssl.TLSVersion.TLSv1_3)
        leaf = authority().issue_cert("localhost", "127.0.0.1")
        chain = b"".join(pem.bytes() for pem in leaf.cert_chain_pems)
        files["tls_certificate"].write_bytes(chain)
        # The key still belongs to the old certificate.
        assert await handshake(port, ssl.TLSVersion.TLSv1_3) == before
        files["tls_key"].write_bytes(leaf.private_key_pem.bytes())
        own = ssl.PEM_cert_to_DER_cert(leaf.cert_chain_pems[0].bytes().decode())

        async def renewed() -> bool:
            found = [await handshake(port, ssl.TLSVersion.TLSv1_3) for _ in range(4)]
            return set(found) == {own}

        await eventually(renewed, "the new certificate is used")
        assert await verify(first) is grpc.StatusCode.OK
        async with encrypted(target, "manager") as second:
            assert await verify(second) is grpc.StatusCode.PERMISSION_DENIED

        other = trustme.CA()
        bundle = comment + ca_pem() + comment + other.cert_pem.bytes()
        files["tls_client_ca"].write_bytes(bundle)
        joined = made([x509.DNSName("verifier.internal")], signed_by=other)
        for _ in range(4):
            async with secured(target, joined) as third:
                assert await verify(third) is grpc.StatusCode.OK
    assert [line for line in service.log if line["event"] == "certificates rejected"]
    assert await service.end() == 0


async def handshake(port: int, version: ssl.TLSVersion) -> bytes | None:
    """Do a handshake with one TLS version; return the server's certificate, or None if the
    handshake fails."""
    context = ssl.create_default_context(cadata=ca_pem().decode())
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    client = authority().issue_cert("verifier.internal")
    client.configure_cert(context)
    try:
        _, writer = await asyncio.open_connection("localhost", port, ssl=context)
    except (ssl.SSLError, ConnectionError):
        return None
    found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        await writer.wait_closed()
    assert isinstance(found, bytes)
    return found


async def openssl_version(port: int, option: str) -> str | None:
    """Do a handshake with the program `openssl`; return the version that it reports, or None."""
    process = await asyncio.create_subprocess_exec(
        *("openssl", "s_client", option, "-brief", "-connect", f"localhost:{port}"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(WAIT_SECONDS):
        said, _ = await process.communicate()
    match = re.search(rb"^Protocol version: (\S+)", said, re.MULTILINE)
    return None if match is None else match[1].decode()


async def test_the_readmes_first_caller(run: Run, folder: Path, latchkey: Path) -> None:
    """The README's commands create a caller and show the effect of the policy: that caller may
    call, and no other."""
    readme = (ROOT / "README.md").read_text("utf-8")
    make, ask = re.findall(r"<!-- test: policy -->\n```bash\n(.+?)```", readme, re.DOTALL)

    async def shell(command: str, **environment: str) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            "bash",
            "-c",
            command.replace(".venv/bin/latchkey", str(latchkey)),
            cwd=folder,
            env=os.environ | environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        async with asyncio.timeout(60):
            said, _ = await process.communicate()
        return process.returncode, said.decode()

    code, said = await shell(make)
    assert (code, "policy.toml now has the caller shop" in said) == (0, True), said
    anyone, service = run(), run(policy=folder / "policy.toml")
    _, said = await shell(ask, LATCHKEY_TARGET=await anyone.welcome())
    assert re.findall(r"exit code \d|CALLER_\w+|MALFORMED", said) == ["MALFORMED", "exit code 5"], (
        said
    )
    _, said = await shell(ask, LATCHKEY_TARGET=await service.welcome())
    assert re.findall(r"exit code \d|CALLER_\w+|MALFORMED", said) == [
        "CALLER_ANONYMOUS",
        "exit code 7",
        "MALFORMED",
        "exit code 5",
    ], said
