"""Traces need an extra, and one of OTLP's protocols."""

import pytest
from latchkey_service.settings.settings import Settings
from latchkey_service.settings.traces import problems


def test_without_traces_nothing_is_needed() -> None:
    """With traces off, the variables of OpenTelemetry are ignored: other programs may use them."""
    assert problems("off", {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "no.such.library") == []
    assert Settings.model_fields["traces"].default == "off"


@pytest.mark.parametrize("library", ["no_such_library.trace_exporter", "json.no_such_module"])
def test_a_missing_extra_is_named(library: str) -> None:
    """One sentence says how to install it."""
    (problem,) = problems("on", {}, library)
    assert problem.startswith("LATCHKEY_TRACES: needs the libraries of the extra 'tracing'")


@pytest.mark.parametrize(
    "name", ["OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"]
)
def test_only_one_protocol(name: str) -> None:
    """Spans must not go to a port that expects another protocol."""
    assert problems("on", {name: "http/protobuf"}) == problems("on", {name: ""}) == []
    (problem,) = problems("on", {name: "grpc"})
    assert problem.startswith(f"{name}: must be http/protobuf or unset")


@pytest.mark.parametrize(
    "name", ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"]
)
def test_an_endpoint_has_a_scheme(name: str) -> None:
    """Without one, no span would ever arrive. The text does not quote the URL's credential."""
    for endpoint in ("", "http://localhost:4318", "HTTPS://collector:4318/v1/traces"):
        assert problems("on", {name: endpoint}) == []
    (problem,) = problems("on", {name: "user:canary@localhost:4318"})
    assert problem.startswith(f"{name}: must begin with http:// or https://")
    assert "canary" not in problem


def test_a_disabled_sdk_is_a_contradiction() -> None:
    """The library would record nothing, and give every call the same trace id."""
    assert problems("on", {"OTEL_SDK_DISABLED": "false"}) == []
    (problem,) = problems("on", {"OTEL_SDK_DISABLED": " True"})
    assert problem.startswith("OTEL_SDK_DISABLED: must not be true")


def test_the_variable_for_traces_comes_first() -> None:
    """The variable for traces takes precedence, as in the exporter."""
    names = {
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
    }
    assert problems("on", names) == []
