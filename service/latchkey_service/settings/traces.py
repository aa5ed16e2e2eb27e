"""Checks that the service can export traces."""

import importlib.util
import math
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from typing import Final

__all__ = ["PROVIDERS", "problems"]

# Of the extra `tracing`.
_LIBRARY: Final = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL: Final = "http/protobuf"
_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_SCHEMES: Final = ("http://", "https://")
_DISABLED: Final = "OTEL_SDK_DISABLED"
# The library reads these when it is imported, and raises if one is not a number.
_LIMITS: Final = (
    "OTEL_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT",
    "OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_LINK_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT",
    "OTEL_SPAN_EVENT_COUNT_LIMIT",
    "OTEL_SPAN_LINK_COUNT_LIMIT",
)
# Not a limit: any number of them.
_UNSET: Final = "unset"
# The library replaces wrong values of these by its default, or drops them, silently.
_TIMEOUTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT")
_COMPRESSIONS: Final = ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "OTEL_EXPORTER_OTLP_COMPRESSION")
_COMPRESSION: Final = ("none", "gzip", "deflate")
_HEADERS: Final = ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS")
_RESOURCE: Final = "OTEL_RESOURCE_ATTRIBUTES"
# Each names a plug-in that another distribution registers. The exporter raises if it is missing.
PROVIDERS: Final = (
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER",
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_TRACES_CREDENTIAL_PROVIDER",
)
_PROVIDER_GROUP: Final = "opentelemetry_otlp_credential_provider"


def problems(traces: str, environment: Mapping[str, str], library: str = _LIBRARY) -> list[str]:
    """Return why traces cannot be exported, each with what to do. Nothing if they are off."""
    if traces == "off":
        return []
    found = []
    if not _is_installed(library):
        found.append(
            "LATCHKEY_TRACES: needs the libraries of the extra 'tracing'; in the clone,"
            " pip install './service[tracing]' installs them"
        )
    name, protocol = _first(_PROTOCOLS, environment)
    if protocol not in ("", _PROTOCOL):
        found.append(
            f"{name}: must be {_PROTOCOL} or unset; collectors accept it on port 4318 by default"
        )
    name, endpoint = _first(_ENDPOINTS, environment)
    if endpoint and not endpoint.lower().startswith(_SCHEMES):
        # Never quotes the URL, which may contain a credential.
        found.append(f"{name}: must begin with http:// or https://, as in http://127.0.0.1:4318")
    if environment.get(_DISABLED, "").strip().lower() == "true":
        found.append(
            f"{_DISABLED}: must not be true while LATCHKEY_TRACES is on; unset one of them"
        )
    return found + _wrong_values(environment)


def _wrong_values(environment: Mapping[str, str]) -> list[str]:
    """Return which variables of the library have a value that it cannot read. Quotes no value,
    because headers contain credentials.
    """
    found = [
        f"{name}: must be a whole number, 0 or more, or {_UNSET} for no limit"
        for name in _LIMITS
        if name in environment and not _is_limit(environment[name])
    ]
    name, seconds = _first(_TIMEOUTS, environment)
    if seconds and not _is_timeout(seconds):
        found.append(f"{name}: must be a number of seconds, positive and finite")
    name, compression = _first(_COMPRESSIONS, environment)
    if compression and compression.strip().lower() not in _COMPRESSION:
        found.append(f"{name}: must be one of {', '.join(_COMPRESSION)}")
    name, headers = _first(_HEADERS, environment)
    if not _are_pairs(headers):
        found.append(f"{name}: must be name=value pairs, separated by commas")
    if not _are_pairs(environment.get(_RESOURCE, "")):
        found.append(f"{_RESOURCE}: must be name=value pairs, separated by commas")
    name, provider = _first(PROVIDERS, environment)
    if provider and not entry_points(group=_PROVIDER_GROUP, name=provider):
        found.append(f"{name}: no installed package has a credential provider of this name")
    return found


def _is_limit(value: str) -> bool:
    text = value.strip().lower()
    try:
        return text == _UNSET or int(text) >= 0
    except ValueError:
        return False


def _is_timeout(value: str) -> bool:
    try:
        seconds = float(value)
    except ValueError:
        return False
    return seconds > 0 and math.isfinite(seconds)


def _are_pairs(value: str) -> bool:
    """Return whether each part between commas has a name before its equals sign. An empty part is
    allowed, as after a comma at the end.
    """
    return all(
        not part.strip() or ("=" in part and part.partition("=")[0].strip())
        for part in value.split(",")
    )


def _first(names: Iterable[str], environment: Mapping[str, str]) -> tuple[str, str]:
    """Return the first of these variables that has a value, and the value, as the exporter does."""
    return next(((each, environment[each]) for each in names if environment.get(each)), ("", ""))


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        # A package on the way to the module is missing.
        return False
