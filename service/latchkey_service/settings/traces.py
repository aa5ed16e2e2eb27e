"""Checks that the service can export traces."""

import importlib.util
from collections.abc import Mapping
from typing import Final

__all__ = ["problems"]

# Of the extra `tracing`.
_LIBRARY: Final = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL: Final = "http/protobuf"


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
    name = next((each for each in _PROTOCOLS if environment.get(each)), None)
    if name is not None and environment[name] != _PROTOCOL:
        found.append(
            f"{name}: must be {_PROTOCOL} or unset; collectors accept it on port 4318 by default"
        )
    return found


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        # A package on the way to the module is missing.
        return False
