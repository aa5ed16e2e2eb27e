"""A service with a policy and a TLS listener to which anybody can connect."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.callers import policy_text, write_server_files
from tests.helpers.free_ports import free_port
from tests.helpers.service_process import Service, service

__all__ = ["tls_service"]


@contextlib.contextmanager
def tls_service(
    folder: Path, database_url: str, *python: str, **settings: object
) -> Iterator[tuple[Service, str]]:
    """Start it, with PYTHON where its memory matters. Yields the service, and the address of its
    TLS listener."""
    policy = folder / "policy.toml"
    policy.write_text(policy_text())
    files = write_server_files(folder)
    # With it, callers without a certificate could not connect.
    del files["tls_client_ca"]
    target = f"localhost:{free_port()}"
    with service(
        folder / "service",
        python or None,
        listen="127.0.0.1:0",
        database_url=database_url,
        data_dir=folder / "data",
        log_format="json",
        policy=policy,
        tls_listen=target,
        **files,
        **settings,
    ) as running:
        yield running, target
