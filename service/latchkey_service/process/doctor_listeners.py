"""Checks of `latchkey doctor` on the addresses of the service: whether it answers, or could listen.

They open connections as clients do, and bind an address for a moment if nobody listens on it.
"""

import errno
import socket
import ssl
import time
from pathlib import Path
from typing import Final

import grpc

from latchkey_service.process.finding import Finding, failure, ok, skipped, warning
from latchkey_service.process.healthcheck import SERVING, ask, target
from latchkey_service.settings.settings import PREFIX, Settings

__all__ = ["listener_findings"]

# Both ends are on this machine.
CONNECT_SECONDS: Final = 2.0
# An idle service answers within milliseconds.
SLOW_SECONDS: Final = 0.5
_START: Final = "start the service: latchkey serve"


def listener_findings(settings: Settings) -> list[Finding]:
    """Check each address of the service."""
    found = [_plaintext(settings.listen)]
    if settings.tls_listen is not None:
        found.append(_encrypted(settings))
    return found


def _plaintext(listen: str) -> Finding:
    check = "listener"
    try:
        address = target(listen)
    except ValueError as error:
        return skipped(check, str(error))
    if (closed := _closed(check, "LISTEN", listen, address)) is not None:
        return closed
    began = time.monotonic()
    try:
        status = ask(address)
    except grpc.RpcError as error:
        return failure(
            check,
            f"a program listens on {listen}, and does not answer as Latchkey does "
            f"({error.code().name})",
            f"stop it, or choose another address with {PREFIX}LISTEN; if it is Latchkey, see its "
            "log",
        )
    took = time.monotonic() - began
    if took >= SLOW_SECONDS:
        return warning(
            check,
            f"the service on {listen} took {took:.1f} s to report {status}",
            "its event loop is late: it has too much load or too little processor time, and may "
            "report the database as unavailable although it answers; add workers or processors",
        )
    if status != SERVING:
        return warning(
            check,
            f"the service on {listen} reports {status}",
            "it starts, stops, or cannot renew its lease: see its log and the other findings",
        )
    return ok(check, f"the service on {listen} reports {status}")


def _encrypted(settings: Settings) -> Finding:
    check = "TLS listener"
    listen = settings.tls_listen or ""
    try:
        address = target(listen)
    except ValueError as error:
        return skipped(check, str(error))
    if (closed := _closed(check, "TLS_LISTEN", listen, address)) is not None:
        return closed
    # The name and the chain are checked with the files.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, port = _pair(address)
    try:
        with (
            socket.create_connection((host, port), CONNECT_SECONDS) as connection,
            context.wrap_socket(connection) as encrypted,
        ):
            served = encrypted.getpeercert(binary_form=True)
    except OSError as error:
        return failure(
            check,
            f"a program listens on {listen}, and does not speak TLS ({error})",
            f"stop it, or choose another address with {PREFIX}TLS_LISTEN",
        )
    if served is not None and served != _first(settings.tls_certificate):
        return warning(
            check,
            f"the service on {listen} uses another certificate than the one in the file",
            "it rejected the file, and says why in its log; or another program listens there",
        )
    return ok(check, f"the service on {listen} uses the certificate in the file")


def _first(path: Path | None) -> bytes | None:
    """Return the first certificate in a PEM file, or None."""
    try:
        text = "" if path is None else path.read_text("ascii", "replace")
        end = "-----END CERTIFICATE-----"
        begin = text.index("-----BEGIN CERTIFICATE-----")
        return ssl.PEM_cert_to_DER_cert(text[begin : text.index(end, begin) + len(end)])
    except (OSError, ValueError):
        return None


def _closed(check: str, setting: str, listen: str, address: str) -> Finding | None:
    """Return a finding if nobody listens on an address, or None."""
    try:
        if address.startswith("unix:"):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(CONNECT_SECONDS)
                connection.connect(address.removeprefix("unix:"))
        else:
            socket.create_connection(_pair(address), CONNECT_SECONDS).close()
    except FileNotFoundError:
        return warning(check, f"nobody listens on {listen}", _START)
    except OSError as error:
        refused = isinstance(error, ConnectionRefusedError)
        reason = None if address.startswith("unix:") else _unbindable(listen)
        if reason is not None:
            remedy = f"choose another address with {PREFIX}{setting}"
            return failure(check, f"cannot listen on {listen}: {reason}", remedy)
        why = "" if refused else f" ({error.strerror or error})"
        return warning(check, f"nobody listens on {listen}{why}", _START)
    return None


def _unbindable(listen: str) -> str | None:
    """Return why no program of this user can listen on an address, or None."""
    host, _, port = listen.rpartition(":")
    try:
        family, kind, _, _, place = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        if error.errno == errno.EACCES:
            return "this user may not use the port"
        return error.strerror or str(error)
    return None


def _pair(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
