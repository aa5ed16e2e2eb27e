"""`latchkey` against a service with a policy: access options, variables, errors, and `audit`."""

import asyncio
import json
import os
import re
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.callers import (
    credential,
    policy_text,
    spiffe_identity,
    uri,
    write_server_files,
)
from tests.helpers.fork_server import Forked
from tests.helpers.servers import fresh_database, make_settings, serving_as
from tests.helpers.tool import PYTHON
from tests.helpers.waiting import eventually

TIMEOUT_SECONDS = 60.0


class Tool:
    """Runs `latchkey` against one service."""

    def __init__(self, folder: Path, plaintext: str, encrypted: str, forked: Forked) -> None:
        self.command = forked("latchkey_cli")
        self.folder = folder
        self.plaintext = plaintext
        self.encrypted = encrypted

    async def run(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            *self.command,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=self.folder,
            env={
                "PATH": os.defpath,
                "HOME": str(self.folder),
                "LANG": "C.UTF-8",
                "TZ": "UTC",
                "LATCHKEY_TARGET": self.plaintext,
                "LATCHKEY_ACCOUNT": "acme",
                **environment,
            },
        )
        async with asyncio.timeout(TIMEOUT_SECONDS):
            out, err = await process.communicate()
        assert process.returncode is not None
        assert b"Traceback" not in err
        return process.returncode, out.decode(), err.decode()


@pytest.fixture(scope="module")
async def tool(
    postgres_url: str, template_url: str, pepper_file: Path, scratch: Path, forked: Forked
) -> AsyncIterator[Tool]:
    folder = scratch / "cli-access"
    folder.mkdir()
    (folder / "policy.toml").write_text(policy_text())
    identity = spiffe_identity(uri("manager"))
    (folder / "own.pem").write_bytes(identity.certificate)
    (folder / "own.key").write_bytes(identity.key)
    for name in ("manager", "operator", "verifier", "nobody"):
        (folder / name).write_text(credential(name) + "\n")
    settings = make_settings(await fresh_database(postgres_url), pepper_file, "native").model_copy(
        update={
            "policy": folder / "policy.toml",
            "tls_listen": "127.0.0.1:0",
            **write_server_files(folder),
        }
    )
    async with serving_as(settings) as server:
        assert server.tls_address is not None
        yield Tool(folder, server.address, server.tls_address, forked)


async def test_ways_to_identify_the_caller(tool: Tool) -> None:
    """Certificates and credentials come from options before the command or from the environment;
    options win."""
    certificate = {
        "LATCHKEY_TLS_CA": "clients.pem",
        "LATCHKEY_TLS_CERTIFICATE": "own.pem",
        "LATCHKEY_TLS_KEY": "own.key",
        "LATCHKEY_TARGET": tool.encrypted,
    }
    options = ("--tls-ca", "clients.pem", "--tls-certificate", "own.pem", "--tls-key", "own.key")
    results = await asyncio.gather(
        tool.run("list", **certificate),
        tool.run(*options, "list", LATCHKEY_TARGET=tool.encrypted),
        tool.run("--credential-file", "manager", "list"),
        tool.run("list", LATCHKEY_CREDENTIAL=credential("manager")),
        tool.run("list", LATCHKEY_CREDENTIAL_FILE="manager"),
        tool.run(
            "--credential-file", "manager", "list", LATCHKEY_CREDENTIAL=credential("verifier")
        ),
    )
    for code, _, err in results:
        assert code == 0, err


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_tls_1_3_only(
    tool: Tool, version: ssl.TLSVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool completes no handshake with a server that offers only TLS 1.2."""
    # gRPC reads this setting when it is loaded.
    monkeypatch.setattr(tool, "command", PYTHON)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    files = write_server_files(tool.folder)
    context.load_cert_chain(files["tls_certificate"], files["tls_key"])
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    handshakes = []

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handshakes.append(writer.get_extra_info("ssl_object").version())
        writer.close()

    async with await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context) as server:
        port = server.sockets[0].getsockname()[1]
        arguments = ("--tls-ca", "clients.pem", "list", "--timeout", "2")
        code, _, err = await tool.run(*arguments, LATCHKEY_TARGET=f"localhost:{port}")
    assert code == 6, err
    assert set(handshakes) == ({"TLSv1.3"} if version is ssl.TLSVersion.TLSv1_3 else set())


async def test_access_errors_say_what_to_do(tool: Tool) -> None:
    """Every access error has its exit code and says what to do."""
    cases: list[tuple[tuple[str, ...], dict[str, str], int, str]] = [
        (("list",), {}, 7, "CALLER_ANONYMOUS"),
        (("--credential-file", "nobody", "list"), {}, 7, "CREDENTIAL_UNKNOWN"),
        (("--credential-file", "verifier", "list"), {}, 7, "METHOD_DENIED"),
        (("--credential-file", "own.key", "list"), {}, 2, "is not a credential"),
        (("--credential-file", "gone", "list"), {}, 2, "gone: No such file"),
        (("--tls-ca", "gone", "list"), {}, 2, "gone: No such file"),
        (("--tls-key", "own.key", "list"), {}, 2, "belong together"),
        (("--tls-ca", "gone", "console", "--account", "a"), {}, 2, "gone: No such file"),
        (
            ("--credential-file", "manager", "console", "--account", "a"),
            {"LATCHKEY_TARGET": "latchkey.internal:1"},
            2,
            "unencrypted",
        ),
        (
            ("--credential-file", "manager", "list"),
            {"LATCHKEY_TARGET": "latchkey.internal:1"},
            2,
            "unencrypted",
        ),
        (("--tls-ca", "own.pem", "list", "--timeout", "20"), {}, 6, "does not speak TLS"),
        (
            ("--tls-ca", "clients.pem", "list", "--timeout", "20"),
            {"LATCHKEY_TARGET": tool.encrypted},
            6,
            "client certificate",
        ),
    ]
    results = await asyncio.gather(
        *(tool.run(*arguments, **environment) for arguments, environment, _, _ in cases)
    )
    for (arguments, _, expected, said), (code, out, err) in zip(cases, results, strict=True):
        assert (code, out) == (expected, ""), (arguments, err)
        assert said in err, arguments
        assert "lkc_" not in err.replace("lkc_ ", ""), err


async def entries(tool: Tool, *arguments: str) -> list[dict[str, Any]]:
    code, out, err = await tool.run("--credential-file", "operator", "audit", "--json", *arguments)
    assert code == 0, err
    found: list[dict[str, Any]] = json.loads(out)
    # Reading the audit log is recorded too.
    return [entry for entry in found if entry["caller"] != "operator"]


async def test_audit(tool: Tool) -> None:
    """`latchkey audit` lists calls as a table or as JSON and applies every filter. Callers without
    the right get an error."""
    code, secret, err = await tool.run(
        "--credential-file", "manager", "create", "seen", "--scope", "read", "-a", "audited"
    )
    assert code == 0, err
    await tool.run("--credential-file", "verifier", "list", "-a", "audited")

    async def both() -> Any:
        found = await entries(tool, "-a", "audited")
        return found if len(found) == 2 else None

    denied, created = await eventually(both, "entries for both calls")
    assert created["caller"] == "manager"
    assert created["method"] == "/latchkey.v1.TokenService/Create"
    assert (created["outcome"], created["code"], created["calls"]) == ("OUTCOME_OK", 0, 1)
    assert re.fullmatch(r"tok_[0-9a-z]{26}", created["token_id"])
    assert (denied["outcome"], denied["reason"]) == ("OUTCOME_DENIED", "METHOD_DENIED")
    assert await entries(tool, "-a", "audited", "--outcome", "denied") == [denied]
    assert await entries(tool, "-a", "audited", "--method", "create") == [created]
    assert await entries(tool, "-a", "audited", "--caller", "verifier") == [denied]
    assert await entries(tool, "--token", created["token_id"]) == [created]
    assert await entries(tool, "--outcome", "denied", "--limit", "1") == [denied]
    assert await entries(tool, "-a", "audited", "--since", "1h") == [denied, created]
    assert await entries(tool, "-a", "audited", "--until", "1h") == []
    code, out, _ = await tool.run("--credential-file", "operator", "audit", "-a", "audited")
    assert code == 0
    lines = [line for line in out.splitlines() if " operator " not in line]
    assert lines[0].split() == ["Time", "Caller", "Method", "Account", "Outcome", "From", "Token"]
    assert re.search(r"verifier +List +audited +denied: METHOD_DENIED +ipv4:127\.0\.0\.1", lines[1])
    assert re.search(r"manager +Create +audited +ok +ipv4:127\.0\.0\.1:\d+ +tok_", lines[2])
    assert secret.strip() not in out
    code, _, err = await tool.run("--credential-file", "manager", "audit")
    assert (code, "METHOD_DENIED" in err) == (7, True)
    code, _, err = await tool.run("--credential-file", "operator", "audit", "--since", "soon")
    assert (code, "30m, 12h, 7d" in err) == (2, True)


async def test_policy(tool: Tool) -> None:
    """`latchkey policy` runs the service's command."""
    code, out, err = await tool.run("policy", "new-caller", "shop")
    assert code == 0, err
    assert out.startswith("lkc_")
    assert "[callers.shop]" in err
    code, out, err = await tool.run("policy", "check", "policy.toml")
    assert (code, out) == (0, "policy.toml is valid: 10 callers\n"), err


@pytest.mark.parametrize("tls", [False, True], ids=["without TLS", "untrusted"])
async def test_a_tls_fault_on_localhost_is_reported(tool: Tool, tls: bool) -> None:
    """The name localhost has two addresses, and the service listens on one. The error is about TLS
    and not that nothing answers, and a Create that was never sent changed nothing."""
    port = tool.encrypted.rpartition(":")[2]
    # Options are accepted before and after the command.
    target = ("--target", f"localhost:{port}")
    code, _, err = await tool.run(
        *target, "create", "x", "--scope", "read", *(("--tls-ca", "system") if tls else ())
    )
    assert code == 6
    assert ("is not trusted" if tls else "closed the connection") in err
    assert "that Latchkey runs there" not in err
    assert "may exist" not in err
