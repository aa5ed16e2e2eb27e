"""Validates which addresses may be listened on: safe by default, open only on request. Pure."""

from typing import Literal

from latchkey_service.settings.addresses import is_local
from latchkey_service.settings.settings import PREFIX, Settings

__all__ = ["Transport", "problems", "reflects", "transport_of"]

Transport = Literal["native", "grpcio"]


def transport_of(settings: Settings) -> Transport:
    """Return the transport of the plaintext listener.

    By default, `native` serves only this machine. It buffers a message of any size, and even
    decompresses it, before anyone can reject it (0.5.0); only a proxy in front could prevent that.
    So anyone who can reach it can fill a worker's memory. An operator may still choose it
    explicitly.
    """
    if "transport" in settings.model_fields_set:
        return settings.transport
    return "native" if is_local(settings.listen) else "grpcio"


def reflects(settings: Settings, listen: str) -> bool:
    """Return whether a listener serves reflection.

    The default is off behind a proxy, which lets other machines reach a local listener.
    """
    if settings.reflection == "auto":
        return is_local(listen) and settings.trusted_proxy is None
    return settings.reflection == "on"


def problems(settings: Settings) -> list[str]:
    """Return the contradictions between settings, each with what to set instead."""
    found = []
    local = is_local(settings.listen)
    if settings.policy is not None and settings.insecure_listen == "anonymous":
        # On a local address too: if the policy were removed, everyone could call.
        found.append(
            f"{PREFIX}INSECURE_LISTEN: anonymous cannot be combined with {PREFIX}POLICY. Unset it "
            f"and keep {PREFIX}LISTEN on 127.0.0.1; or, where the network encrypts, set "
            f"{PREFIX}INSECURE_LISTEN=plaintext"
        )
    elif not local and settings.insecure_listen != "anonymous":
        if settings.policy is None:
            found.append(
                f"{PREFIX}LISTEN: other machines can reach {settings.listen}, and without a policy "
                f"everyone who reaches it may do everything. Use {PREFIX}TLS_LISTEN and "
                f"{PREFIX}POLICY for that address, and keep {PREFIX}LISTEN on 127.0.0.1; or, where "
                f"something else restricts access, set {PREFIX}INSECURE_LISTEN=anonymous"
            )
        elif settings.insecure_listen != "plaintext":
            found.append(
                f"{PREFIX}LISTEN: other machines can reach {settings.listen}, and it is not "
                f"encrypted. Use {PREFIX}TLS_LISTEN for that address, and keep {PREFIX}LISTEN on "
                f"127.0.0.1; or, where the network encrypts, set {PREFIX}INSECURE_LISTEN=plaintext"
            )
    found += _tls_problems(settings)
    if settings.trusted_proxy is not None:
        if settings.policy is None:
            found.append(f"{PREFIX}TRUSTED_PROXY: has no effect without {PREFIX}POLICY")
        if not local:
            found.append(
                f"{PREFIX}TRUSTED_PROXY: requires {PREFIX}LISTEN on a UNIX socket or a loopback "
                "address"
            )
    found += _metrics_problems(settings)
    if settings.webhook_url is not None and settings.webhook_secret_file is None:
        found.append(f"{PREFIX}WEBHOOK_SECRET_FILE: is required with {PREFIX}WEBHOOK_URL")
    if settings.webhook_url is None and settings.webhook_secret_file is not None:
        found.append(f"{PREFIX}WEBHOOK_SECRET_FILE: has no effect without {PREFIX}WEBHOOK_URL")
    if settings.migrate == "off" and settings.database_url is None:
        found.append(f"{PREFIX}MIGRATE: off requires {PREFIX}DATABASE_URL")
    if settings.workers > 1 and settings.listen.startswith("unix:"):
        found.append(
            f"{PREFIX}WORKERS: several processes cannot share a UNIX socket; "
            "listen on HOST:PORT, or set it to 1"
        )
    return found


def _metrics_problems(settings: Settings) -> list[str]:
    listen = settings.metrics_listen
    if listen is None:
        return []
    if listen.startswith("unix:"):
        return [f"{PREFIX}METRICS_LISTEN: must be HOST:PORT; Prometheus reads no UNIX socket"]
    if listen in (settings.listen, settings.tls_listen) and not listen.endswith(":0"):
        return [f"{PREFIX}METRICS_LISTEN: is the same address as that of the calls"]
    return []


def _tls_problems(settings: Settings) -> list[str]:
    files = {
        "TLS_CERTIFICATE": settings.tls_certificate,
        "TLS_KEY": settings.tls_key,
        "TLS_CLIENT_CA": settings.tls_client_ca,
    }
    listen = settings.tls_listen
    if listen is None:
        given = [name for name, path in files.items() if path is not None]
        return [f"{PREFIX}{name}: has no effect without {PREFIX}TLS_LISTEN" for name in given]
    found = []
    if listen.startswith("unix:"):
        found.append(f"{PREFIX}TLS_LISTEN: must be HOST:PORT; a UNIX socket needs no TLS")
    if listen == settings.listen and not listen.endswith(":0"):
        found.append(f"{PREFIX}TLS_LISTEN: is the same address as {PREFIX}LISTEN")
    found += [
        f"{PREFIX}{name}: is required with {PREFIX}TLS_LISTEN"
        for name in ("TLS_CERTIFICATE", "TLS_KEY")
        if files[name] is None
    ]
    if settings.policy is None and not is_local(listen):
        found.append(
            f"{PREFIX}TLS_LISTEN: other machines can reach {listen}, and without {PREFIX}POLICY "
            "everyone who reaches it may do everything: set a policy"
        )
    return found
