"""Checks that the service can export traces."""

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Final

__all__ = ["problems"]

# Of the extra `tracing`.
_LIBRARY: Final = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL: Final = "http/protobuf"
_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_SCHEMES: Final = ("http://", "https://")
_DISABLED: Final = "OTEL_SDK_DISABLED"


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
    return found


def _first(names: Iterable[str], environment: Mapping[str, str]) -> tuple[str, str]:
    """Return the first of these variables that has a value, and the value, as the exporter does."""
    return next(((each, environment[each]) for each in names if environment.get(each)), ("", ""))


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        # A package on the way to the module is missing.
        return False
