"""The listeners of one worker, and the servicers that they share.

Owns how listeners start, report health and stop. It owns no background tasks (`wiring.py`).
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from grpc_health.v1 import health, health_pb2_grpc
from latchkey_coherence.lease import boottime
from latchkey_proto.v1 import audit_service_pb2 as audit_pb
from latchkey_proto.v1 import audit_service_pb2_grpc as audit_pb_grpc
from latchkey_proto.v1 import maintenance_service_pb2 as maintenance_pb
from latchkey_proto.v1 import maintenance_service_pb2_grpc as maintenance_pb_grpc
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import status_service_pb2_grpc as status_pb_grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from latchkey_service.access import policy as policies
from latchkey_service.access.authenticator import ActivePolicy, Authenticator
from latchkey_service.access.policy import PolicyError
from latchkey_service.coherence.watch_sessions import WatchSessions
from latchkey_service.process.worker_metrics import WorkerMetrics
from latchkey_service.process.worker_watch import memory_max_bytes
from latchkey_service.rpc.audit_service import AuditService
from latchkey_service.rpc.call_report import CallReporter
from latchkey_service.rpc.handlers import Paths, Registrar
from latchkey_service.rpc.health_service import Health
from latchkey_service.rpc.lifecycle_service import FullTokenService
from latchkey_service.rpc.maintenance_service import MaintenanceService
from latchkey_service.rpc.reflection_service import (
    REFLECTION_SERVICES,
    Reflection,
    register_reflection,
)
from latchkey_service.rpc.status_service import StatusService
from latchkey_service.settings import exposure
from latchkey_service.settings.logs import logger
from latchkey_service.settings.settings import Settings
from latchkey_service.transport.connection_guard import ConnectionGuard
from latchkey_service.transport.memory_pressure import (
    KnownPeers,
    MemoryPressure,
    resident_bytes,
    trim,
)
from latchkey_service.transport.tls import Certificates
from latchkey_service.transport.transports import Limits, make_transport, metadata_reader

__all__ = ["SERVICES", "Server", "Services"]

SERVICES = (
    pb.DESCRIPTOR.services_by_name["TokenService"].full_name,
    status_pb.DESCRIPTOR.services_by_name["StatusService"].full_name,
    audit_pb.DESCRIPTOR.services_by_name["AuditService"].full_name,
    maintenance_pb.DESCRIPTOR.services_by_name["MaintenanceService"].full_name,
)


@dataclass(frozen=True, slots=True)
class Services:
    """The servicers, the same ones on every listener."""

    tokens: FullTokenService
    status: StatusService
    audit: AuditService
    maintenance: MaintenanceService
    health: Health


class Server:
    """The listeners, which serve our services.

    `address` is the address of the plaintext listener, `tls_address` that of the TLS listener or
    None.
    """

    def __init__(
        self,
        settings: Settings,
        paths: Paths,
        reporter: CallReporter,
        services: Services,
        watch_sessions: WatchSessions,
        active_policy: ActivePolicy | None,
        limits: Limits,
    ) -> None:
        self._watch_sessions = watch_sessions
        self._health = services.health
        self._active_policy = active_policy
        # A separate thread. The event loop's own threads may be busy, for example with DNS
        # look-ups, and the removal of a right must not wait for those.
        self._parsing = ThreadPoolExecutor(1, "policy")
        transport = exposure.transport_of(settings)
        metadata_of = metadata_reader(transport)
        self._known = known = KnownPeers()
        strict = list[str]()
        # `native` does not know the peers of its streams, and behind a proxy, all have its address.
        direct = transport == "grpcio" and settings.trusted_proxy is None
        authenticator = screen = None
        if active_policy is not None:
            authenticator = Authenticator(
                active_policy,
                proxy=settings.trusted_proxy,
                metadata_of=metadata_of,
                recognized=known.add if direct else None,
            )
            screen = authenticator.screen
        plaintext = make_transport(transport, limits, reporter.rejected, screen)
        self._servers = [plaintext]
        reflected = exposure.reflects(settings, settings.listen)
        self.certificates: Certificates | None = None
        _register(
            services,
            Registrar(
                plaintext,
                paths,
                authenticator,
                metadata_of,
                screen if transport == "grpcio" else None,
            ),
            reflected=reflected,
        )
        self.address = _with_port(settings.listen, plaintext.add_insecure_port(settings.listen))
        if authenticator is not None and direct:
            strict.append(self.address)
        self.tls_address: str | None = None
        if settings.tls_listen is not None:
            # Always grpcio: `native` has no TLS.
            encrypted = make_transport("grpcio", limits, reporter.rejected)
            self._servers.append(encrypted)
            authenticator = screen = None
            # With a CA, every client has a certificate, which the metadata do not show.
            by_certificate = settings.tls_client_ca is not None
            if active_policy is not None:
                authenticator = Authenticator(active_policy, tls=True, recognized=known.add)
                screen = None if by_certificate else authenticator.screen
            reflected = exposure.reflects(settings, settings.tls_listen)
            registrar = Registrar(
                encrypted,
                paths,
                authenticator,
                metadata_reader("grpcio"),
                screen,
                by_certificate=by_certificate,
            )
            _register(services, registrar, reflected=reflected)
            assert settings.tls_certificate is not None, "checked in exposure.py"  # noqa: S101 - for the type checker
            assert settings.tls_key is not None, "checked in exposure.py"  # noqa: S101 - for the type checker
            self.certificates = Certificates(
                settings.tls_certificate, settings.tls_key, settings.tls_client_ca
            )
            port = encrypted.add_secure_port(settings.tls_listen, self.certificates.credentials())
            self.tls_address = _with_port(settings.tls_listen, port)
            if authenticator is not None:
                strict.append(self.tls_address)

        addresses = [address for address in (self.address, self.tls_address) if address is not None]
        proxied = [] if settings.trusted_proxy is None else [self.address]
        pressure = MemoryPressure(memory_max_bytes(settings), resident_bytes, trim)
        self.guard = ConnectionGuard(addresses, limits, proxied, strict, known, pressure)
        self.refused = reporter.refused
        self.refused.end_connection = self.guard.end
        self.metrics: WorkerMetrics
        """Set by `running`."""

    async def start(self) -> None:
        """Start serving. Health reports NOT_SERVING until `set_serving` changes it."""
        for server in self._servers:
            await server.start()

    def set_serving(self, serving: bool) -> None:  # noqa: FBT001 - called back
        """Set whether the health service reports SERVING."""
        self._health.set_serving(serving=serving)

    async def replace_policy(self, text: str) -> None:
        """Replace the policy. If this raises PolicyError, the old one stays in force."""
        if self._active_policy is None:
            raise PolicyError("this worker was started without a policy; restart the service")
        loop = asyncio.get_running_loop()
        policy = await loop.run_in_executor(self._parsing, policies.parse, text)
        # The streams that the policy allows are authorized again, which adds their peers again.
        self._known.clear()
        self._active_policy.replace(policy)
        logger().info("policy in force", callers=len(policy.callers))

    async def stop(self, grace_seconds: float, *, drain_seconds: float = 0.0) -> bool:
        """Stop gracefully: report NOT_SERVING, hand clients over, then wait for calls in progress.

        Accepts new calls for another `drain_seconds`, in which load balancers notice that health is
        down. Then cancels calls that have not finished after `grace_seconds`. Returns whether every
        client has given up its lease from this process.
        """
        self._health.stop()
        end = boottime() + drain_seconds + grace_seconds
        # Calls succeed in the meantime, so a client that moves loses none.
        _, drained = await asyncio.gather(
            asyncio.sleep(drain_seconds), self._watch_sessions.drain(drain_seconds + grace_seconds)
        )
        # Otherwise these streams would use up the whole grace period.
        self._health.end_watches()
        left = max(0.0, end - boottime())
        await asyncio.gather(*(server.stop(left) for server in self._servers))
        return drained


def _register(services: Services, registrar: Any, *, reflected: bool) -> None:
    pb_grpc.add_TokenServiceServicer_to_server(services.tokens, registrar)
    status_pb_grpc.add_StatusServiceServicer_to_server(services.status, registrar)
    audit_pb_grpc.add_AuditServiceServicer_to_server(services.audit, registrar)
    maintenance_pb_grpc.add_MaintenanceServiceServicer_to_server(services.maintenance, registrar)
    health_pb2_grpc.add_HealthServicer_to_server(services.health, registrar)
    if reflected:
        names = (*SERVICES, health.SERVICE_NAME, *REFLECTION_SERVICES)
        register_reflection(Reflection(names), registrar)
    registrar.refuse_others()


def _with_port(listen: str, port: int) -> str:
    """Return `listen` with the port that the system assigned."""
    return listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"
