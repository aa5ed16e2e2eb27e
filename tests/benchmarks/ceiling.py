"""A server that answers every Verify with one constant: the upper limit of the stack's speed.

It uses the service's own transport, event loop, options and contract, without any other part of the
service around the handler. Run as a script with the transport's name.
"""

import asyncio
import signal
import sys

import grpc
import pygrpc_native.aio
import uvloop
from google.protobuf.timestamp_pb2 import Timestamp
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.settings.exposure import Transport
from latchkey_service.transport.transports import Limits, options_of

ANSWER = pb.VerifyResponse(
    verdict=pb.VERDICT_VALID,
    token=pb.Token(
        id=f"tok_{0:026}",
        account_id="bench",
        name="token 00000000",
        scope=pb.SCOPE_READ,
        create_time=Timestamp(seconds=1_800_000_000, nanos=123_456_000),
        hint="lk_…0000",
    ),
    revision=1,
    mark=0x0123456789ABCDEF,
)


class Constant(pb_grpc.TokenServiceServicer):
    """Verify only."""

    async def Verify(  # noqa: N802 - named in the .proto
        self, request: pb.VerifyRequest, context: "grpc.aio.ServicerContext[object, object]"
    ) -> pb.VerifyResponse:
        return ANSWER


async def serve(transport: Transport) -> None:
    """Serve on a free loopback port, print the address, end on SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    options = options_of(transport, Limits())
    server: grpc.aio.Server
    if transport == "native":
        # The library's own option.
        server = pygrpc_native.aio.Server(options=options, io_threads=1)
    else:
        server = grpc.aio.server(options=options)
    pb_grpc.add_TokenServiceServicer_to_server(
        Constant(),  # type: ignore[abstract]  # whatever else is asked is UNIMPLEMENTED
        server,
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"serves on 127.0.0.1:{port}\n")
    sys.stdout.flush()
    await stop.wait()
    await server.stop(0)


if __name__ == "__main__":
    uvloop.run(serve("native" if sys.argv[1] == "native" else "grpcio"))
