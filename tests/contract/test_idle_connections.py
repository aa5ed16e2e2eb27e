"""Connections to Postgres that nobody uses are closed."""

import grpc
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.postgres import connections
from latchkey_service.process import periodic
from latchkey_service.settings.settings import Settings

from tests.helpers.calls import CHANNEL_OPTIONS
from tests.helpers.servers import serving_as
from tests.helpers.waiting import eventually


async def test_the_connection_of_deletes_is_closed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that has its own lease closes the connection on which Deletes wait, too."""
    monkeypatch.setattr(connections, "REST_SECONDS", 0.2)
    monkeypatch.setattr(periodic, "REST_SECONDS", 0.05)
    async with (
        serving_as(settings) as server,
        grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel,
    ):
        stub: pb_grpc.TokenServiceAsyncStub = pb_grpc.TokenServiceStub(channel)
        request = pb.CreateRequest(account_id="acme", name="a token", scope=pb.SCOPE_READ)
        token = (await stub.Create(request, timeout=5)).token
        await stub.Delete(pb.DeleteRequest(account_id="acme", id=token.id), timeout=5)
        waiter = server.metrics.ack_waiter
        await eventually(lambda: waiter._connection.current is None, "the connection is closed")
