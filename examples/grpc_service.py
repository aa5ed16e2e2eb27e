"""A gRPC service that lets in only calls with a valid token. It serves grpc.health.v1.Health.

    python examples/grpc_service.py 8080

With --threads, it is the same service for a server with threads.
"""

import asyncio
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from latchkey import Scope, Verifier, sync
from latchkey.guards import current_token, grpc_sync
from latchkey.guards.grpc import GuardInterceptor

TARGET = os.environ.get("LATCHKEY_TARGET", "127.0.0.1:50051")
Status = health_pb2.HealthCheckResponse


class Shop(health_pb2_grpc.HealthServicer):
    """Stands for your servicer. Write it for threads by leaving out `async`."""

    async def Check(self, request: health_pb2.HealthCheckRequest, context: object) -> Status:
        """Answer, and print who called."""
        del request, context
        print("called by", current_token().account_id, flush=True)
        return Status(status=Status.SERVING)


class ShopWithThreads(health_pb2_grpc.HealthServicer):
    """The same for threads."""

    def Check(self, request: health_pb2.HealthCheckRequest, context: object) -> Status:
        """Answer, and print who called."""
        del request, context
        print("called by", current_token().account_id, flush=True)
        return Status(status=Status.SERVING)


async def serve(port: int) -> None:
    """Serve until Ctrl-C."""
    async with Verifier(TARGET) as verifier:
        writes = {"/shop.v1.Orders/Create": Scope.WRITE}
        server = grpc.aio.server(
            interceptors=[GuardInterceptor(verifier, Scope.READ, scopes=writes)]
        )
        health_pb2_grpc.add_HealthServicer_to_server(Shop(), server)
        print("port", server.add_insecure_port(f"127.0.0.1:{port}"), flush=True)
        await server.start()
        try:
            await server.wait_for_termination()
        finally:
            await server.stop(5)  # seconds for running calls to finish


def serve_with_threads(port: int) -> None:
    """Serve until Ctrl-C."""
    with sync.Verifier(TARGET) as verifier:
        guard = grpc_sync.GuardInterceptor(verifier, Scope.READ)
        server = grpc.server(ThreadPoolExecutor(8), interceptors=[guard])
        health_pb2_grpc.add_HealthServicer_to_server(ShopWithThreads(), server)
        print("port", server.add_insecure_port(f"127.0.0.1:{port}"), flush=True)
        server.start()
        try:
            server.wait_for_termination()
        finally:
            server.stop(5).wait()


if __name__ == "__main__":
    try:
        if "--threads" in sys.argv:
            serve_with_threads(int(sys.argv[1]))
        else:
            asyncio.run(serve(int(sys.argv[1])))
    except KeyboardInterrupt:
        pass
