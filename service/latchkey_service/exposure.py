"""What may be listened on: safe by default, and open to others only when told so. Pure."""

import ipaddress
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from latchkey_service.config import Settings

__all__ = ["Transport", "is_local", "problems", "reflects", "transport_of"]

PREFIX = "LATCHKEY_"

Transport = Literal["native", "grpcio"]


def is_local(listen: str) -> bool:
    """Tell whether only processes of this machine can reach an address.

    No name is but "localhost" (RFC 6761 §6.3): what another one stands for may change.
    """
    if listen.startswith("unix:"):
        return True
    host = listen.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def transport_of(settings: "Settings") -> Transport:
    """Return the transport of the plaintext listener.

    By itself `native` serves this machine alone: it keeps a message of any size, and unpacks a
    compressed one, before anybody can say no (0.5.0, and nothing in front of it can know better
    but a proxy). Who reaches it can fill a worker's memory. That is for who chose it to judge.
    """
    if "transport" in settings.model_fields_set:
        return settings.transport
    return "native" if is_local(settings.listen) else "grpcio"


def reflects(settings: "Settings", listen: str) -> bool:
    """Tell whether a listener describes the service to whoever asks.

    Not behind a proxy by itself: it brings others to a local listener.
    """
    if settings.reflection == "auto":
        return is_local(listen) and settings.trusted_proxy is None
    return settings.reflection == "on"


def problems(settings: "Settings") -> list[str]:
    """Return what is wrong with settings that do not go together, and what to set instead."""
    found = []
    local = is_local(settings.listen)
    if settings.policy is not None and settings.insecure_listen == "anonymous":
        # On a local address as well: it would let everyone in once the policy is gone.
        found.append(
            f"{PREFIX}INSECURE_LISTEN: anonymous is for a service without a policy. With "
            f"{PREFIX}POLICY, leave it out and keep {PREFIX}LISTEN on 127.0.0.1; or set "
            f"{PREFIX}INSECURE_LISTEN=plaintext where the network encrypts"
        )
    elif not local and settings.insecure_listen != "anonymous":
        if settings.policy is None:
            found.append(
                f"{PREFIX}LISTEN: {settings.listen} is reached from elsewhere, and without a "
                f"policy whoever reaches it may do everything. Listen there with "
                f"{PREFIX}TLS_LISTEN and {PREFIX}POLICY, and keep {PREFIX}LISTEN on 127.0.0.1; or "
                f"set {PREFIX}INSECURE_LISTEN=anonymous where something else keeps others out"
            )
        elif settings.insecure_listen != "plaintext":
            found.append(
                f"{PREFIX}LISTEN: {settings.listen} is reached from elsewhere, and is not "
                f"encrypted. Listen there with {PREFIX}TLS_LISTEN, and keep {PREFIX}LISTEN on "
                f"127.0.0.1; or set {PREFIX}INSECURE_LISTEN=plaintext where the network encrypts"
            )
    found += _tls_problems(settings)
    if settings.trusted_proxy is not None:
        if settings.policy is None:
            found.append(f"{PREFIX}TRUSTED_PROXY: without {PREFIX}POLICY nobody asks who calls")
        if not local:
            found.append(
                f"{PREFIX}TRUSTED_PROXY: a proxy is believed on a UNIX socket or on loopback only, "
                f"and {PREFIX}LISTEN is neither"
            )
    if settings.workers > 1 and settings.listen.startswith("unix:"):
        found.append(
            f"{PREFIX}WORKERS: several processes cannot share a UNIX socket; "
            "listen on HOST:PORT, or use 1"
        )
    return found


def _tls_problems(settings: "Settings") -> list[str]:
    files = {
        "TLS_CERTIFICATE": settings.tls_certificate,
        "TLS_KEY": settings.tls_key,
        "TLS_CLIENT_CA": settings.tls_client_ca,
    }
    listen = settings.tls_listen
    if listen is None:
        given = [name for name, path in files.items() if path is not None]
        return [f"{PREFIX}{name}: is of no use without {PREFIX}TLS_LISTEN" for name in given]
    found = []
    if listen.startswith("unix:"):
        found.append(f"{PREFIX}TLS_LISTEN: give HOST:PORT; a UNIX socket needs no TLS")
    if listen == settings.listen and not listen.endswith(":0"):
        found.append(f"{PREFIX}TLS_LISTEN: is the same address as {PREFIX}LISTEN")
    found += [
        f"{PREFIX}{name}: is required with {PREFIX}TLS_LISTEN"
        for name in ("TLS_CERTIFICATE", "TLS_KEY")
        if files[name] is None
    ]
    if settings.policy is None and not is_local(listen):
        found.append(
            f"{PREFIX}TLS_LISTEN: {listen} is reached from elsewhere, and without {PREFIX}POLICY "
            "whoever reaches it may do everything: set it"
        )
    return found
