"""The whole life of tokens, in random order, against a plain reference model."""

import asyncio
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import grpc
import pytest
from google.protobuf import field_mask_pb2
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.contract.life_model import Model, WrongAcceptError, hint_of
from tests.contract.life_mutants import MUTANTS
from tests.helpers.imported_keys import IMPORTED_PREFIX, imported_key, sha256_of
from tests.helpers.waiting import WAIT_SECONDS, eventually

EXAMPLES = 25
# How long a faulty service may take to answer as it should, which it never does.
MUTANT_SECONDS = 0.5
# How a fault shows. The types are of a status where the model expects a response, and of the
# reverse.
FOUND = (AssertionError, AttributeError, TypeError, grpc.aio.AioRpcError)
# Far longer than the steps of an example take.
EXAMPLE_SECONDS = 120.0
# Long enough for rotations of a token that are then retired, revoked or deleted.
STEPS_MIN = 20
STEPS_MAX = 30
ACCOUNTS = ("acme", "globex")
NAMES = ("a", "b", "c")
PERMISSIONS = ("orders:read", "orders:write", "orders:*")
NETWORKS = ("10.0.0.0/8", "192.0.2.0/24")
ADDRESSES = ("", "10.1.2.3", "192.0.2.1")


Example = Callable[[Any, list[tuple[Any, ...]]], Coroutine[Any, Any, None]]


class Life:
    """Does each step on the service and on the model."""

    def __init__(self, stub: Any, within: float) -> None:
        self.stub = stub
        self.within = within
        self.tokens: list[Model] = []
        # Accounts of this example, which no other one uses.
        self.suffix = uuid.uuid4().hex[:12]

    def live(self, account: str) -> list[Model]:
        return [t for t in self.tokens if t.account == account and not t.deleted]

    def named(self, token: Model) -> dict[str, Any]:
        return {"account_id": self.account(token.account), "id": token.id}

    def account(self, name: str) -> str:
        return f"{name}-{self.suffix}"

    async def code(self, call: Any) -> Any:
        """Return the response, or the status code."""
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            return error.code()

    async def create(
        self,
        account: str,
        name: str,
        scope: int,
        lost: int,
        permissions: tuple[str, ...] = (),
        networks: tuple[str, ...] = (),
    ) -> None:
        """Create with a request id, whose answer is lost `lost` times."""
        request = pb.CreateRequest(
            account_id=self.account(account),
            name=name,
            scope=pb.Scope.ValueType(scope),
            permissions=permissions,
            allowed_networks=networks,
            request_id=str(uuid.uuid4()),
        )
        answers = [await self.code(self.stub.Create(request, timeout=9)) for _ in range(1 + lost)]
        if any(token.name == name for token in self.live(account)):
            assert set(answers) == {grpc.StatusCode.ALREADY_EXISTS}
            return
        assert len({answer.token.id for answer in answers}) == 1
        token = Model(account, answers[0].token.id, name, scope, permissions, networks)
        # Only the last answer was received.
        token.secrets = [(a.secret, a is answers[-1]) for a in reversed(answers)]
        self.tokens.append(token)

    async def import_(
        self, account: str, name: str, scope: int, lost: int, disabled: bool, asked: bool
    ) -> None:
        """Import a secret, with lost answers, and perhaps after somebody has presented it."""
        secret = imported_key()
        if asked:
            # The service remembers for a moment that it lacks the secret.
            answer = await self.stub.Verify(pb.VerifyRequest(secret=secret), timeout=9)
            assert answer.verdict == pb.VERDICT_UNKNOWN
        row = self.imported_row(account, name, secret)
        row.scope, row.disabled = pb.Scope.ValueType(scope), disabled
        results = [await self.import_row(row) for _ in range(1 + lost)]
        if any(token.name == name for token in self.live(account)):
            assert {result.outcome for result in results} == {pb.IMPORT_OUTCOME_NAME_TAKEN}
            return
        first, *others = results
        assert first.outcome == pb.IMPORT_OUTCOME_IMPORTED
        assert all(o.outcome == pb.IMPORT_OUTCOME_EXISTS and o.id == first.id for o in others)
        token = Model(account, first.id, name, scope, disabled=disabled)
        token.secrets, token.imported = [(secret, True)], secret
        self.tokens.append(token)

    async def import_again(self, token: Model, account: str) -> None:
        """Import the secret of a token, live or deleted, once more: that changes nothing."""
        if token.imported is None:
            return
        result = await self.import_row(self.imported_row(account, "again", token.imported))
        if account == token.account:
            assert (result.outcome, result.id) == (pb.IMPORT_OUTCOME_EXISTS, token.id)
        else:
            # Not whose it is.
            assert (result.outcome, result.id) == (pb.IMPORT_OUTCOME_OTHER_ACCOUNT, "")

    def imported_row(self, account: str, name: str, secret: str) -> pb.ImportedToken:
        return pb.ImportedToken(
            account_id=self.account(account),
            name=name,
            scope=pb.SCOPE_WRITE,
            secret_sha256=sha256_of(secret),
            hint=hint_of(secret),
        )

    async def import_row(self, row: pb.ImportedToken) -> pb.ImportResult:
        answer = await self.stub.Import(pb.ImportRequest(tokens=[row]), timeout=9)
        result: pb.ImportResult = answer.results[0]
        return result

    async def rotate(self, token: Model, grace: bool, lost: int, times: int) -> None:
        for _ in range(times if grace else 1):
            await self.rotate_once(token, grace, lost)

    async def rotate_once(self, token: Model, grace: bool, lost: int) -> None:
        request = pb.RotateRequest(**self.named(token), request_id=str(uuid.uuid4()))
        if grace:
            request.grace.seconds = 3600
        working = sum(works for _, works in token.secrets)
        answers = [await self.code(self.stub.Rotate(request, timeout=9)) for _ in range(1 + lost)]
        if token.deleted:
            assert set(answers) == {grpc.StatusCode.NOT_FOUND}
        elif grace and working >= 5:
            assert set(answers) == {grpc.StatusCode.FAILED_PRECONDITION}
        else:
            older = [(secret, works and grace) for secret, works in token.secrets]
            token.secrets = [(a.secret, a is answers[-1]) for a in reversed(answers)] + older

    async def update(self, token: Model, path: str, value: Any) -> None:
        attribute = {"allowed_networks": "networks"}.get(path, path)
        request = pb.UpdateRequest(
            **self.named(token),
            token=pb.Token(**{path: value}),
            update_mask=field_mask_pb2.FieldMask(paths=[path]),
        )
        answer = await self.code(self.stub.Update(request, timeout=9))
        others = [t for t in self.live(token.account) if t is not token]
        if token.deleted:
            assert answer is grpc.StatusCode.NOT_FOUND
        elif path == "name" and any(other.name == value for other in others):
            assert answer is grpc.StatusCode.ALREADY_EXISTS
        else:
            assert isinstance(answer, pb.UpdateResponse)
            before = getattr(token, attribute)
            setattr(token, attribute, value)
            if (
                (path == "scope" and value < before)
                or (
                    path == "permissions"
                    and not {*before} <= {*value}
                    and PERMISSIONS[2] not in value
                )
                or (path == "allowed_networks" and value and not {*before} <= {*value})
                or (path == "allowed_networks" and value and not before)
            ):
                # It may have narrowed the token, so the answer proves that this is in effect.
                assert answer.receipt.HasField("effective_time")

    async def switch(self, token: Model, on: bool) -> None:
        call = self.stub.Enable if on else self.stub.Disable
        request = (pb.EnableRequest if on else pb.DisableRequest)(**self.named(token))
        answer = await self.code(call(request, timeout=9))
        if token.deleted:
            assert answer is grpc.StatusCode.NOT_FOUND
        else:
            assert answer.token.HasField("disable_time") is not on
            token.disabled = not on

    async def retire(self, token: Model) -> None:
        request = pb.RetireSecretsRequest(**self.named(token))
        answer = await self.code(self.stub.RetireSecrets(request, timeout=9))
        if token.deleted:
            assert answer is grpc.StatusCode.NOT_FOUND
        else:
            # Not the newest one that works: the newest.
            token.secrets = [
                (secret, works and number == 0)
                for number, (secret, works) in enumerate(token.secrets)
            ]

    async def revoke(self, token: Model, number: int) -> None:
        number %= len(token.secrets)
        secret, works = token.secrets[number]
        request = pb.RevokeSecretRequest(secrets=[secret])
        (result,) = (await self.stub.RevokeSecret(request, timeout=9)).results
        ended = result.outcome == pb.SECRET_OUTCOME_ENDED
        assert ended == (works and not token.deleted)
        if not token.deleted:
            token.secrets[number] = (secret, False)

    async def revoke_and_retire(self, token: Model) -> None:
        await self.rotate(token, grace=True, lost=0, times=1)
        await self.revoke(token, 0)
        await self.retire(token)

    async def delete(self, token: Model) -> None:
        await self.stub.Delete(pb.DeleteRequest(**self.named(token)), timeout=9)
        token.deleted = True

    async def delete_all(self, account: str, writers: bool) -> None:
        request = pb.DeleteAllRequest(account_id=self.account(account))
        if writers:
            request.filter.scope = pb.SCOPE_WRITE
        chosen = [t for t in self.live(account) if not writers or t.scope == pb.SCOPE_WRITE]
        answer = await self.stub.DeleteAll(request, timeout=9)
        assert answer.count == len(chosen)
        for token in chosen:
            token.deleted = True

    async def check(self) -> None:
        """Compare verdicts and listings with the model.

        A token that should be refused is refused at once. Changes that widen may take a moment.
        """
        await eventually(self.verdicts_agree, "the verdicts of the model", self.within)
        await self.check_lists()

    async def verdicts_agree(self) -> bool:
        agree = True
        questions = [
            (token, secret, scope, address, required)
            for token in self.tokens
            for secret, _ in token.secrets
            for scope, address, required in (
                (0, "", ()),
                (pb.SCOPE_WRITE, "10.1.2.3", ("orders:read",)),
                (pb.SCOPE_READ, "192.0.2.1", ("orders:write",)),
            )
        ]
        if questions:
            batch = pb.BatchVerifyRequest(
                requests=[
                    pb.VerifyRequest(
                        secret=secret,
                        required_scope=pb.Scope.ValueType(scope),
                        client_address=address,
                        required_permissions=required,
                    )
                    for _, secret, scope, address, required in questions
                ]
            )
            answers = (await self.stub.BatchVerify(batch, timeout=9)).responses
            for (token, secret, scope, address, required), answer in zip(
                questions, answers, strict=True
            ):
                found = pb.Verdict.Name(answer.verdict).removeprefix("VERDICT_")
                expected = token.verdict(secret, scope, address, required)
                if found == "VALID" != expected:
                    raise WrongAcceptError(expected, replace(token, secrets=[]))
                assert answer.token.id == token.id
                agree = agree and found == expected
        return agree

    async def check_lists(self) -> None:
        for account in ACCOUNTS:
            request = pb.ListRequest(account_id=self.account(account), page_size=500)
            listed = (await self.stub.List(request, timeout=9)).tokens
            assert [
                (t.id, t.name, t.scope, tuple(t.permissions), tuple(t.allowed_networks))
                for t in reversed(listed)
            ] == [(t.id, t.name, t.scope, t.permissions, t.networks) for t in self.live(account)]
            for shown, token in zip(reversed(listed), self.live(account), strict=True):
                hints = [
                    hint_of(secret)
                    for number, (secret, works) in enumerate(token.secrets)
                    if works or number == 0
                ]
                assert [secret.hint for secret in shown.secrets] == hints


# Mostly one token, because a fault often needs several changes of the same token.
numbers = st.sampled_from([0, 0, 0, 0, 1, 2, 5])
scopes = st.sampled_from([1, 2])
names = st.sampled_from(NAMES)
permissions = st.lists(st.sampled_from(PERMISSIONS), max_size=2, unique=True).map(tuple)
networks = st.lists(st.sampled_from(NETWORKS), max_size=2, unique=True).map(tuple)
accounts = st.sampled_from(ACCOUNTS)
# Each kind of step, with its arguments and how often it comes.
STEPS: tuple[tuple[int, tuple[Any, ...]], ...] = (
    (2, (st.just("create"), accounts, names, scopes, st.integers(0, 2))),
    (
        2,
        (
            st.just("import_"),
            accounts,
            names,
            scopes,
            st.integers(0, 1),
            st.sampled_from([False, False, False, True]),
            st.booleans(),
        ),
    ),
    (2, (st.just("import_again"), numbers, accounts)),
    # Several at once, up to one more than a token may have: most of what follows depends on it.
    (
        4,
        (
            st.just("rotate"),
            numbers,
            st.sampled_from([True, True, False]),
            st.sampled_from([0, 0, 1]),
            st.sampled_from([1, 1, 2, 5]),
        ),
    ),
    (2, (st.just("update"), numbers, st.just("scope"), scopes)),
    (2, (st.just("update"), numbers, st.just("permissions"), permissions)),
    (2, (st.just("update"), numbers, st.just("allowed_networks"), networks)),
    (1, (st.just("update"), numbers, st.just("name"), names)),
    (3, (st.just("switch"), numbers, st.sampled_from([False, False, True]))),
    (2, (st.just("retire"), numbers)),
    (2, (st.just("revoke"), numbers, st.sampled_from([0, 0, 1, 2, 5]))),
    # Together, because what is newest matters to both.
    (2, (st.just("revoke_and_retire"), numbers)),
    (1, (st.just("delete"), numbers)),
    (2, (st.just("delete_all"), accounts, st.booleans())),
)
# By number, because `one_of` counts a strategy once, however often it is listed.
weighted = st.sampled_from([n for n, (weight, _) in enumerate(STEPS) for _ in range(weight)])
steps = st.lists(
    weighted.flatmap(lambda number: st.tuples(*STEPS[number][1])),
    min_size=STEPS_MIN,
    max_size=STEPS_MAX,
)


async def live(stub: Any, chosen: list[tuple[Any, ...]], within: float = WAIT_SECONDS) -> None:
    life = Life(stub, within)
    for account in ACCOUNTS:
        # As much as a token can have, so that there is something to take away.
        await life.create(account, NAMES[0], pb.SCOPE_WRITE, 0, PERMISSIONS[:2], NETWORKS)
    # So that each example has a token with a secret that it did not make.
    await life.import_(ACCOUNTS[0], NAMES[1], pb.SCOPE_WRITE, 0, disabled=False, asked=True)
    for name, *arguments in chosen:
        if name in ("create", "import_", "delete_all"):
            await getattr(life, name)(*arguments)
        elif life.tokens:
            alive = [token for token in life.tokens if not token.deleted]
            # The last number stands for tokens that may be deleted, too.
            pool = alive if alive and arguments[0] < 5 else life.tokens
            token = pool[arguments[0] % len(pool)]
            await getattr(life, name)(token, *arguments[1:])
        await life.check()


async def run_examples(address: str, example: Example) -> None:
    """Run `example` with as many lives of tokens as there are examples."""
    # hypothesis is synchronous: it runs in a thread, and each example on this event loop.
    loop = asyncio.get_running_loop()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.TokenServiceStub(channel)

        @settings(
            max_examples=EXAMPLES,
            suppress_health_check=list(HealthCheck),
            database=None,
            # Shrinking a failure would take minutes.
            phases=(Phase.generate,),
        )
        @given(steps)
        def run(chosen: list[tuple[Any, ...]]) -> None:
            done = asyncio.run_coroutine_threadsafe(example(stub, chosen), loop)
            done.result(EXAMPLE_SECONDS)

        await asyncio.to_thread(run)


# The event loop in the other thread uses `random` while hypothesis draws.
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")
async def test_the_life_of_tokens(shared_servers: Any, transport: str) -> None:
    """Whatever happens to created and imported tokens, in any order and with lost answers, verdicts
    and listings are those of the model after each step."""
    address, _ = await shared_servers(transport, imported_prefixes=IMPORTED_PREFIX)
    await run_examples(address, live)


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")
async def test_faults_are_found(
    shared_servers: Any, monkeypatch: pytest.MonkeyPatch, mutant: Any
) -> None:
    """The examples find each planted fault."""
    address, _ = await shared_servers("native", imported_prefixes=IMPORTED_PREFIX)
    found: list[Exception] = []

    async def until_found(stub: Any, chosen: list[tuple[Any, ...]]) -> None:
        # hypothesis would repeat an example that fails, to no use here.
        if not found:
            try:
                await live(stub, chosen, MUTANT_SECONDS)
            except (*FOUND, WrongAcceptError) as error:
                found.append(error)

    mutant(monkeypatch)
    await run_examples(address, until_found)
    assert found
