"""The Helm chart and the plain manifests, against the schemas of Kubernetes and of the values."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from latchkey_service.settings.loading import load

from tests.helpers.programs import HELM, INSTALLS, installed_by_go, run
from tests.helpers.repository import ROOT

CHART = ROOT / "deploy" / "helm" / "latchkey"
MANIFESTS = ROOT / "deploy" / "kubernetes" / "latchkey.yaml"
# The oldest release that the chart supports, and the newest that the package knows.
KUBERNETES = ("1.30", "1.37")
HELM_SECONDS = 60.0
# One worker of pytest-xdist imports the package with the schemas.
SCHEMAS = pytest.mark.xdist_group("kubernetes")
EVERYTHING = ("migrations.enabled=true", "metrics.serviceMonitor=true", "securityContext=null")


def needs_helm(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that builds and runs Helm."""
    slow = pytest.mark.slow("builds and runs Helm")
    # In one group too, because the others would only wait for the first one's build.
    return slow(SCHEMAS(INSTALLS(test)))


def helm(*words: str) -> tuple[int, str]:
    """Run Helm, which the runners of GitHub have. Elsewhere it is built, which takes minutes."""
    program = installed_by_go("helm", HELM)
    return run((str(program), *words), HELM_SECONDS, dict(os.environ))


def rendered(*values: str) -> str:
    """Return what `make manifests` renders, with other values."""
    more = [word for value in values for word in ("--set", value)]
    code, said = helm("template", "latchkey", str(CHART), "--kube-version", "1.30.0", *more)
    assert code == 0, said
    return said


def resources(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


def valid(text: str) -> list[str]:
    """Check all resources against the schemas of Kubernetes; return their kinds."""
    # Its import takes more than a second, which all workers of pytest-xdist would spend.
    import kubernetes_validate

    kinds = []
    for resource in resources(text):
        kinds.append(resource["kind"])
        # A resource of the Prometheus operator.
        if resource["kind"] != "ServiceMonitor":
            for release in KUBERNETES:
                kubernetes_validate.validate(resource, release, strict=True)
    return sorted(kinds)


def deployment(text: str) -> dict[str, Any]:
    """Return the pod of the Deployment."""
    (found_one,) = (r for r in resources(text) if r["kind"] == "Deployment")
    pod: dict[str, Any] = found_one["spec"]["template"]["spec"]
    return pod


@SCHEMAS
def test_the_manifests_match_the_schemas_of_kubernetes() -> None:
    """The plain manifests have no unknown field and no wrong type, in any supported release."""
    kinds = ["Deployment", "NetworkPolicy", "PodDisruptionBudget", "Service"]
    assert valid(MANIFESTS.read_text()) == kinds


@SCHEMAS
def test_the_schemas_find_an_unknown_field() -> None:
    """The check above is strict."""
    import kubernetes_validate

    text = MANIFESTS.read_text().replace("enableServiceLinks", "enableServiceLink")
    with pytest.raises(kubernetes_validate.ValidationError):
        valid(text)


@needs_helm
def test_the_manifests_come_from_the_chart() -> None:
    """`make manifests` would change nothing."""
    assert MANIFESTS.read_text().partition("---\n")[2] == rendered().partition("---\n")[2]


@needs_helm
def test_the_chart_has_no_faults() -> None:
    """`helm lint --strict` accepts the chart."""
    code, said = helm("lint", "--strict", str(CHART))
    assert code == 0, said


@needs_helm
@pytest.mark.parametrize("tls", ["true", "false"])
def test_all_options_match_the_schemas_of_kubernetes(tls: str) -> None:
    """With every option on, the chart renders valid resources, for plaintext and TLS."""
    kinds = valid(rendered(f"tls.enabled={tls}", *EVERYTHING))
    assert {"Job", "ServiceMonitor"} < set(kinds)


@needs_helm
@pytest.mark.parametrize(
    "value", ["replica=3", "settings.LATCHKEY_LISTEN=a", "image.digest=latest", "tls.secret=A_b"]
)
def test_wrong_values_are_rejected(value: str) -> None:
    """The schema of the values rejects misspelled names, and settings that the chart itself
    sets."""
    code, said = helm("template", "x", str(CHART), "--kube-version", "1.30.0", "--set", value)
    assert code != 0
    assert "values don't meet the specifications of the schema" in said


def test_pods_may_not_do_more_than_they_need() -> None:
    """The pod runs without root, capabilities, a writable root or a token of Kubernetes, and gets
    the time that a shutdown takes."""
    pod = deployment(MANIFESTS.read_text())
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    environment = {e["name"]: e.get("value") for e in container["env"]}
    stop = sum(int(environment[f"LATCHKEY_{n}_SECONDS"] or 0) for n in ("DRAIN", "GRACE"))
    stop += container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= stop + 5


def test_the_service_accepts_the_settings_of_the_pod(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every setting in the manifests exists, and together they are consistent."""
    (container,) = deployment(MANIFESTS.read_text())["containers"]
    monkeypatch.chdir(tmp_path)
    for each in container["env"]:
        url = "postgresql://latchkey@db/latchkey"
        monkeypatch.setenv(each["name"], each.get("value", url))
    settings = load()
    assert settings.tls_listen == "0.0.0.0:50052"
    assert settings.listen == "127.0.0.1:50051"


def test_the_schema_of_the_values_knows_each_value() -> None:
    """Each default is in the schema; the schema reserves each setting that the templates set."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(values) == set(schema["properties"]) - {"global"}
    template = (CHART / "templates" / "deployment.yaml").read_text()
    names = set(re.findall(r"name: (LATCHKEY_\w+)", template))
    reserved = schema["properties"]["settings"]["propertyNames"]["not"]["enum"]
    assert names == set(reserved)
