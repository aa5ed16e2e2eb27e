"""Operations of every kind on the service, each of which checks its answers."""

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import latchkey
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from latchkey_proto.v1 import audit_service_pb2 as audit_pb
from latchkey_proto.v1 import audit_service_pb2_grpc as audit_grpc
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import status_service_pb2_grpc as status_grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.helpers.callers import CALLERS, credential, policy_text
from tests.helpers.imported_keys import imported_key, sha256_of
from tests.helpers.token_feed import Board
from tests.helpers.waiting import eventually
from tests.helpers.watch_client import WatchClient
from tests.soak.connections import (
    CALL_SECONDS,
    UNANSWERED,
    Connections,
    Place,
    WrongAnswer,
    bearer,
    must_be,
    must_end,
)

__all__ = ["Act", "Operations"]

Act = Callable[[], Awaitable[None]]

# Permanent tokens, and the number of accounts of the temporary ones, which keeps Lists at one
# length.
LIVE = 200
LIVE_ACCOUNT = "resident"
ACCOUNTS = 50
# Between a Create and its Delete: verifiers have cached the token by then.
LIFE_SECONDS = 0.5
# The caller that is added to the policy and removed from it.
GUEST = "acmes-operator"
POLICY_SECONDS_MAX = 5.0
REFUSED = frozenset({pb.VERDICT_DELETED, pb.VERDICT_UNKNOWN})


class Operations:
    """What callers of all kinds do. Each method is one operation. It raises WrongAnswer for an
    answer that must not occur."""

    def __init__(
        self, place: Place, connections: Connections, board: Board, chance: random.Random
    ) -> None:
        self._place = place
        self._connections = connections
        self._board = board
        self._random = chance
        self._numbers = iter(range(10**9))
        self.live: list[str] = []
        """Secrets of the permanent tokens."""
        self._guest_is_in = True
        # Each change to the policy is in force before the next one is made.
        self._policy_changes = asyncio.Lock()

    @property
    def rates(self) -> dict[str, tuple[float, Act]]:
        """Each kind of operation, with its rate per second on average."""
        return {
            "verify live": (24.0, self._verify_live),
            "verify missing": (30.0, self._verify_missing),
            "verify made up": (30.0, self._verify_made_up),
            "batch": (6.0, self._batch),
            "create to delete": (18.0, self._lifecycle),
            "import to delete": (3.0, self._imported_lifecycle),
            "verify made-up imported": (6.0, self._verify_made_up_imported),
            "list": (6.0, self._list),
            "channel opens": (6.0, self._channel),
            "broken connection": (3.0, self._broken_connection),
            "watch breaks": (4.5, self._watch),
            "health watch breaks": (1.5, self._health_watch),
            "library client": (1.5, self._library),
            "TLS caller": (4.5, self._tls),
            "denied": (6.0, self._denied),
            "policy changes": (0.1, self._policy),
            "audit": (1.5, self._audit),
            "status": (0.6, self._status),
            "reflection": (0.9, self._reflection),
            "cancelled": (9.0, self._cancelled),
            "tiny deadline": (9.0, self._tiny_deadline),
        }

    async def create_live(self) -> None:
        """Create the permanent tokens."""
        for number in range(LIVE):
            created = await self._connections.create(LIVE_ACCOUNT, f"live {number}")
            self.live.append(created.secret)

    async def ask_anyone(self) -> None:
        """Make a call over a new connection, which reaches a random one of the workers that share
        an address."""
        async with self._connections.fresh() as channel:
            await self._connections.verify(pb_grpc.TokenServiceStub(channel), "")

    # Verifies.

    async def _verify_live(self) -> None:
        stub = self._connections.stub()
        secrets = self._random.sample(self.live, 10)
        for verdict in await asyncio.gather(
            *(self._connections.verify(stub, secret) for secret in secrets)
        ):
            must_be(verdict, pb.VERDICT_VALID, "a live token")

    async def _verify_missing(self) -> None:
        must_be(
            await self._connections.verify(self._connections.stub(), self._connections.missing()),
            pb.VERDICT_UNKNOWN,
            "nobody's",
        )

    async def _verify_made_up(self) -> None:
        secret = self._connections.missing()
        mistyped = secret[:-1] + ("0" if secret[-1] != "0" else "1")
        for made_up in (mistyped, "", "x" * 10_000, "ключ"):
            must_be(
                await self._connections.verify(self._connections.stub(), made_up),
                pb.VERDICT_MALFORMED,
                "made up",
            )

    async def _verify_made_up_imported(self) -> None:
        """Only the database can say that the service lacks a secret of another system."""
        secret = imported_key()
        for _ in range(2):
            must_be(
                await self._connections.verify(self._connections.stub(), secret),
                pb.VERDICT_UNKNOWN,
                "made up, with the prefix of imported secrets",
            )

    async def _batch(self) -> None:
        live = self._random.sample(self.live, 40)
        secrets = [*live, *(self._connections.missing() for _ in range(10)), "nothing"]
        request = pb.BatchVerifyRequest(requests=[pb.VerifyRequest(secret=s) for s in secrets])
        function = self._connections.stub().BatchVerify
        answer = await self._connections.repeat(function, request, "verifier", "BatchVerify")
        verdicts = [response.verdict for response in answer.responses]
        expected = [
            *[pb.VERDICT_VALID] * 40,
            *[pb.VERDICT_UNKNOWN] * 10,
            pb.VERDICT_MALFORMED,
        ]
        must_be(verdicts, expected, "a batch")

    # Tokens.

    async def _lifecycle(self) -> None:
        number = next(self._numbers)
        account = f"account-{number % ACCOUNTS}"
        created = await self._connections.create(account, f"token {number}")
        await self._until_deleted(number, account, created.token.id, created.secret)

    async def _imported_lifecycle(self) -> None:
        number = next(self._numbers)
        account, secret = f"account-{number % ACCOUNTS}", imported_key()
        row = pb.ImportedToken(
            account_id=account,
            name=f"token {number}",
            scope=pb.SCOPE_READ,
            secret_sha256=sha256_of(secret),
        )
        results = await self._import(row)
        if results[0].outcome != pb.IMPORT_OUTCOME_EXISTS:
            # An attempt that failed may have imported it.
            must_be(results[0].outcome, pb.IMPORT_OUTCOME_IMPORTED, "an import")
        await self._until_deleted(number, account, results[0].id, secret)
        # A deleted token's secret stays its own, and is not imported again.
        again = await self._import(row)
        must_be(again[0].outcome, pb.IMPORT_OUTCOME_EXISTS, "an import of a deleted token")

    async def _import(self, row: pb.ImportedToken) -> Any:
        request = pb.ImportRequest(tokens=[row])
        answer = await self._connections.manage("Import", request, "importer")
        return answer.results

    async def _until_deleted(self, number: int, account: str, token_id: str, secret: str) -> None:
        """Verify a new token everywhere, delete it, and verify it again."""
        self._board.created(number, secret)
        get = pb.GetRequest(account_id=account, id=token_id)
        got = await self._connections.manage("Get", get)
        must_be(got.token.id, token_id, "what was created")
        for each in self._connections.stubs:
            must_be(await self._connections.verify(each, secret), pb.VERDICT_VALID, "a new token")
        await asyncio.sleep(LIFE_SECONDS)
        request = pb.DeleteRequest(account_id=account, id=token_id)
        answer = await self._connections.manage("Delete", request)
        self._board.deleted(number)
        if not answer.receipt.HasField("effective_time"):
            raise WrongAnswer("a Delete that waits has no effective time")
        verdicts = await asyncio.gather(
            *(self._connections.verify(each, secret) for each in self._connections.stubs)
        )
        if not REFUSED.issuperset(verdicts):
            raise WrongAnswer(f"{verdicts} for a token whose Delete has answered")

    async def _list(self) -> None:
        request = pb.ListRequest(account_id=LIVE_ACCOUNT, page_size=LIVE // 2)
        seen: set[str] = set()
        while True:
            answer = await self._connections.manage("List", request)
            seen |= {token.id for token in answer.tokens}
            if not answer.next_page_token:
                break
            request.page_token = answer.next_page_token
        must_be(len(seen), LIVE, "tokens in the list")

    # Connections and streams that open and close.

    async def _channel(self) -> None:
        async with self._connections.fresh() as channel:
            stub = pb_grpc.TokenServiceStub(channel)
            must_be(
                await self._connections.verify(stub, self._random.choice(self.live)),
                pb.VERDICT_VALID,
                "a live token",
            )

    async def _broken_connection(self) -> None:
        """A connection that ends in the middle of a message."""
        host, _, port = self._place.address.rpartition(":")
        begun = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(begun[: self._random.randint(0, len(begun))])
        await writer.drain()
        if self._random.random() < 0.5:
            # With a reset.
            writer.transport.abort()
        else:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        del reader

    async def _watch(self) -> None:
        async with self._connections.fresh() as channel:
            client = WatchClient(pb_grpc.TokenServiceStub(channel), bearer("verifier"))
            for _ in range(self._random.randint(0, 3)):
                await client.granted()
                await asyncio.sleep(self._random.uniform(0.0, 0.3))
            match self._random.randrange(4):
                case 0:
                    await client.say(released=True)
                    await client.call.done_writing()
                    await client.refusal()
                case 1:
                    # Without a release: the server waits until its grant has expired.
                    await client.call.done_writing()
                case 2:
                    client.call.cancel()
                case 3:
                    pass  # The channel closes under it.

    async def _health_watch(self) -> None:
        async with self._connections.fresh() as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            call = stub.Watch(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS)
            answer = await call.read()
            must_be(answer.status, health_pb2.HealthCheckResponse.SERVING, "health")
            if self._random.random() < 0.5:
                call.cancel()

    async def _library(self) -> None:
        """A client of the library in this process, with a certificate or a credential."""
        access = latchkey.Access(credential=credential("verifier"))
        target = self._place.address
        if self._random.random() < 0.5:
            target = self._place.tls_address
            access = latchkey.Access(**self._connections.tls_files())
        async with (
            latchkey.Client(target, access=access) as client,
            latchkey.Verifier(client, timeout_seconds=CALL_SECONDS) as verifier,
        ):
            for secret in self._random.sample(self.live, 3):
                answer = await verifier.verify(secret, latchkey.Scope.READ)
                must_be(answer.verdict, latchkey.Verdict.VALID, "a live token")
            await asyncio.sleep(self._random.uniform(0.0, 2.0))

    # Callers and the policy.

    async def _tls(self) -> None:
        name = self._random.choice(("verifier", "manager", "operator"))
        async with self._connections.fresh(name) as channel:
            stub = pb_grpc.TokenServiceStub(channel)
            verify = stub.Verify(
                pb.VerifyRequest(secret=self._random.choice(self.live)), timeout=CALL_SECONDS
            )
            if name == "verifier":
                must_be((await verify).verdict, pb.VERDICT_VALID, "a live token")
                return
            await must_end(verify, grpc.StatusCode.PERMISSION_DENIED)

    async def _denied(self) -> None:
        stub = self._connections.stub()
        secret = self._random.choice(self.live)
        verify = stub.Verify(pb.VerifyRequest(secret=secret), timeout=CALL_SECONDS)
        await must_end(verify, grpc.StatusCode.UNAUTHENTICATED)
        request = pb.ListRequest(account_id=LIVE_ACCOUNT)
        for who in ("verifier", "acmes-manager"):
            call = stub.List(request, timeout=CALL_SECONDS, metadata=bearer(who))
            await must_end(call, grpc.StatusCode.PERMISSION_DENIED)

    async def _policy(self) -> None:
        """Add or remove the guest, and check that each worker soon applies that."""
        async with self._policy_changes:
            await self._change_policy()

    async def _change_policy(self) -> None:
        self._guest_is_in = not self._guest_is_in
        names = [name for name in CALLERS if name != GUEST or self._guest_is_in]
        new = self._place.policy.with_suffix(".new")
        new.write_text(policy_text(names))
        new.replace(self._place.policy)
        os.kill(self._place.pid, signal.SIGHUP)
        expected = (
            grpc.StatusCode.PERMISSION_DENIED
            if self._guest_is_in
            else grpc.StatusCode.UNAUTHENTICATED
        )

        async def heard() -> bool:
            for stub in self._connections.stubs:
                request = pb.ListRequest(account_id=LIVE_ACCOUNT)
                await must_end(
                    stub.List(request, timeout=CALL_SECONDS, metadata=bearer(GUEST)), expected
                )
            return True

        async def heard_by_all() -> bool:
            with contextlib.suppress(WrongAnswer):
                return await heard()
            return False

        await eventually(heard_by_all, "the policy is in force", POLICY_SECONDS_MAX)

    async def _audit(self) -> None:
        stub: Any = audit_grpc.AuditServiceStub(self._connections.channel())
        request = audit_pb.AuditServiceListRequest(account_id=LIVE_ACCOUNT, page_size=100)
        for _ in range(2):
            answer = await self._connections.repeat(stub.List, request, "operator", "audit List")
            must_be(len(answer.entries), 100, "audit entries")
            request.page_token = answer.next_page_token

    async def _status(self) -> None:
        stub: Any = status_grpc.StatusServiceStub(self._connections.channel())
        request = status_pb.GetStatusRequest()
        await self._connections.repeat(stub.GetStatus, request, "operator", "GetStatus")

    async def _reflection(self) -> None:
        """The calls that grpcurl makes."""
        name = "latchkey.v1.TokenService"
        asked = reflection_pb2.ServerReflectionRequest
        async with self._connections.fresh() as channel:
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]  # its stubs are for the other API
            call = stub.ServerReflectionInfo(timeout=CALL_SECONDS)
            await call.write(asked(list_services="*"))
            listed = (await call.read()).list_services_response.service
            if name not in {service.name for service in listed}:
                raise WrongAnswer("reflection does not list TokenService")
            await call.write(asked(file_containing_symbol=name))
            if not (await call.read()).file_descriptor_response.file_descriptor_proto:
                raise WrongAnswer("reflection has no file for TokenService")
            await call.done_writing()

    # Callers that do not wait.

    async def _cancelled(self) -> None:
        call = self._any_call(CALL_SECONDS)
        await asyncio.sleep(self._random.uniform(0.0, 0.004))
        call.cancel()
        try:
            await call
        except asyncio.CancelledError:
            pass
        except grpc.aio.AioRpcError as error:
            # It was refused before it was cancelled.
            if error.code() not in UNANSWERED:
                raise

    async def _tiny_deadline(self) -> None:
        call = self._any_call(self._random.choice((0.0005, 0.001, 0.002, 0.005)))
        with contextlib.suppress(grpc.aio.AioRpcError):
            await call
        code = await call.code()
        # The last of these is rejected by a client that foresees that its deadline will pass.
        if code not in (grpc.StatusCode.OK, *UNANSWERED):
            raise WrongAnswer(f"{code.name} for a tiny deadline")

    def _any_call(self, seconds: float) -> Any:
        stub = self._connections.stub()
        if self._random.random() < 0.5:
            request = pb.VerifyRequest(secret=self._connections.missing())
            return stub.Verify(request, timeout=seconds, metadata=bearer("verifier"))
        return stub.List(
            pb.ListRequest(account_id=LIVE_ACCOUNT),
            timeout=seconds,
            metadata=bearer("manager"),
        )
