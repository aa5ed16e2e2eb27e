"""Traces need an extra, and one of OTLP's protocols."""

import inspect
import re

import opentelemetry.sdk.trace
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


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("OTEL_ATTRIBUTE_COUNT_LIMIT", "0", "-1"),
        ("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "Unset", "abc"),
        ("OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT", " 12 ", "1.5"),
        ("OTEL_LINK_ATTRIBUTE_COUNT_LIMIT", "1", ""),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "128", "many"),
        ("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "128", "abc"),
        ("OTEL_SPAN_EVENT_COUNT_LIMIT", "128", "abc"),
        ("OTEL_SPAN_LINK_COUNT_LIMIT", "128", "abc"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "2.5", "abc"),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "", "-1"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "30", "nan"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "GZIP", "zstd"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20canary,", "canary"),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "", "a=1,=canary"),
        ("OTEL_RESOURCE_ATTRIBUTES", "a=1, b=", "canary"),
        ("OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER", "", "canary"),
        ("OTEL_PYTHON_EXPORTER_OTLP_HTTP_TRACES_CREDENTIAL_PROVIDER", "", "canary"),
    ],
)
def test_values_that_the_library_cannot_read(name: str, right: str, wrong: str) -> None:
    """One sentence names the variable instead of a traceback, or of a default in silence. It does
    not quote the value.
    """
    assert problems("on", {name: right}) == problems("off", {name: wrong}) == []
    (problem,) = problems("on", {name: wrong})
    assert problem.startswith(f"{name}: ")
    assert "canary" not in problem


def test_every_limit_of_the_library_is_known() -> None:
    """The library reads no limit of spans that the check does not know."""
    source = inspect.getsource(opentelemetry.sdk.trace)
    read = set(re.findall(r"OTEL_\w+_LIMIT\b", source))
    assert read
    assert all(problems("on", {name: "abc"}) for name in read)


def test_the_variable_for_traces_comes_first() -> None:
    """The variable for traces takes precedence, as in the exporter."""
    names = {
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
    }
    assert problems("on", names) == []
