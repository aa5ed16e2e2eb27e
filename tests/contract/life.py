"""Does each step of a token's life on the service and on the model, and compares both."""

import time
import uuid
from dataclasses import replace
from typing import Any

import grpc
from google.protobuf import field_mask_pb2
from google.protobuf.timestamp_pb2 import Timestamp
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.contract.life_model import LIMITED_CALLS, Model, WrongAcceptError, hint_of
from tests.contract.life_records import Traces, code_of, reason_of
from tests.helpers.imported_keys import imported_key, sha256_of
from tests.helpers.waiting import eventually

__all__ = ["ACCOUNTS", "LABELS", "PERMISSIONS", "Life"]

ACCOUNTS = ("acme", "globex")
PERMISSIONS = ("orders:read", "orders:write", "orders:*")
LABELS: tuple[dict[str, str], ...] = ({"env": "prod", "team": "a"}, {"env": "dev"}, {})
# How far in the future an expiry lies. A busy machine may need longer to handle the call.
EXPIRY_SECONDS = (0.04, 0.4, 4.0)


class Life:
    """Does each step on the service and on the model."""

    def __init__(self, stub: Any, within: float, traces: Traces) -> None:
        self.stub = stub
        self.within = within
        self.traces = traces
        self.tokens: list[Model] = []
        # Accounts of this example, which no other one uses.
        self.suffix = uuid.uuid4().hex[:12]

    def live(self, account: str) -> list[Model]:
        return [t for t in self.tokens if t.account == account and not t.deleted]

    def taken(self, account: str, name: str, but: Model | None = None) -> bool:
        """Return whether a token that has not expired has the name."""
        others = [t for t in self.live(account) if t is not but and not t.expired]
        return any(token.name == name for token in others)

    def take(self, account: str, name: str, method: str, but: Model | None = None) -> None:
        """Take the name from an expired token. That leaves an entry of the call."""
        for token in self.live(account):
            if token is not but and token.expired and token.named and token.name == name:
                token.named = False
                self.traces.call(self.account(account), method, token.id, reason="NAME_FREED")

    def named(self, token: Model) -> dict[str, Any]:
        return {"account_id": self.account(token.account), "id": token.id}

    def account(self, name: str) -> str:
        return f"{name}-{self.suffix}"

    def add(self, token: Model) -> None:
        self.tokens.append(token)
        self.traces.has(self.account(token.account), token)

    async def call(self, method: str, account: str, request: Any, *, changes: bool = True) -> Any:
        """Return the response, or the status code. A call has one audit entry."""
        token_id = getattr(request, "id", "")
        entry = self.account(account), method
        try:
            answer = await getattr(self.stub, method)(request, timeout=9)
        except grpc.aio.AioRpcError as error:
            self.traces.call(*entry, token_id, code_of(error.code()), reason_of(error))
            return error.code()
        self.traces.call(*entry, token_id or answer.token.id, changes=changes)
        return answer

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
        answers = [await self.call("Create", account, request) for _ in range(1 + lost)]
        if self.taken(account, name):
            assert set(answers) == {grpc.StatusCode.ALREADY_EXISTS}
            return
        assert len({answer.token.id for answer in answers}) == 1
        self.take(account, name, "Create")
        token = Model(account, answers[0].token.id, name, scope, permissions, networks)
        # Only the last answer was received.
        token.secrets = [(a.secret, a is answers[-1]) for a in reversed(answers)]
        self.add(token)

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
        if self.taken(account, name):
            assert {result.outcome for result in results} == {pb.IMPORT_OUTCOME_NAME_TAKEN}
            return
        self.take(account, name, "Import")
        first, *others = results
        assert first.outcome == pb.IMPORT_OUTCOME_IMPORTED
        assert all(o.outcome == pb.IMPORT_OUTCOME_EXISTS and o.id == first.id for o in others)
        token = Model(account, first.id, name, scope, disabled=disabled)
        token.secrets, token.imported = [(secret, True)], secret
        # Calls about several accounts have an entry for each token that they made.
        self.traces.call(self.account(account), "Import", token.id)
        self.add(token)

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

    async def rotate_on_first_use(self, token: Model, lost: int) -> None:
        """Rotate such that the next verify of the new secret ends the older ones."""
        # With two such secrets, the audit log may have one entry for both first uses or two.
        if token.unused not in {secret for secret, works in token.secrets if works}:
            await self.rotate_once(token, grace=False, lost=lost, first_use=True)

    async def rotate(self, token: Model, grace: bool, lost: int, times: int) -> None:
        for _ in range(times if grace else 1):
            await self.rotate_once(token, grace, lost)

    async def rotate_once(
        self, token: Model, grace: bool, lost: int, *, first_use: bool = False
    ) -> None:
        request = pb.RotateRequest(
            **self.named(token), request_id=str(uuid.uuid4()), retire_on_first_use=first_use
        )
        if grace:
            request.grace.seconds = 3600
        working = sum(works for _, works in token.secrets)
        answers = [await self.call("Rotate", token.account, request) for _ in range(1 + lost)]
        if token.deleted:
            assert set(answers) == {grpc.StatusCode.NOT_FOUND}
        elif (grace or first_use) and working >= 5:
            assert set(answers) == {grpc.StatusCode.FAILED_PRECONDITION}
        else:
            older = [(secret, works and (grace or first_use)) for secret, works in token.secrets]
            token.secrets = [(a.secret, a is answers[-1]) for a in reversed(answers)] + older
            if first_use:
                token.unused = answers[-1].secret

    async def update(self, token: Model, path: str, value: Any) -> None:
        attribute = {"allowed_networks": "networks"}.get(path, path)
        request = pb.UpdateRequest(
            **self.named(token),
            token=pb.Token(**{path: value}),
            update_mask=field_mask_pb2.FieldMask(paths=[path]),
        )
        # The name that a token shows changes nothing, even if it has lost it.
        changes = getattr(token, attribute) != value
        answer = await self.call("Update", token.account, request, changes=changes)
        if token.deleted:
            assert answer is grpc.StatusCode.NOT_FOUND
        elif path == "name" and changes and self.taken(token.account, value, token):
            assert answer is grpc.StatusCode.ALREADY_EXISTS
        else:
            assert isinstance(answer, pb.UpdateResponse)
            if path == "name" and changes:
                self.take(token.account, value, "Update", token)
                token.named = True
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

    async def limit(self, token: Model, on: bool) -> None:
        """Give the token a rate limit, or lift it. Another one later has the same bucket."""
        request = pb.UpdateRequest(
            **self.named(token), update_mask=field_mask_pb2.FieldMask(paths=["rate_limit"])
        )
        if on:
            request.token.rate_limit.count, request.token.rate_limit.burst = 1, LIMITED_CALLS
            request.token.rate_limit.period.seconds = 3600
        narrows = on and not token.limited
        answer = await self.call("Update", token.account, request, changes=token.limited is not on)
        if token.deleted:
            assert answer is grpc.StatusCode.NOT_FOUND
        else:
            token.limited = on
            assert answer.token.HasField("rate_limit") is on
            assert answer.receipt.HasField("effective_time") or not narrows

    async def switch(self, token: Model, on: bool) -> None:
        request = (pb.EnableRequest if on else pb.DisableRequest)(**self.named(token))
        method, changes = "Enable" if on else "Disable", token.disabled is on
        answer = await self.call(method, token.account, request, changes=changes)
        if token.deleted:
            assert answer is grpc.StatusCode.NOT_FOUND
        else:
            assert answer.token.HasField("disable_time") is not on
            token.disabled = not on

    async def expire(self, token: Model) -> None:
        """Move the expiry to a moment from now, and wait until it has passed."""
        for seconds in EXPIRY_SECONDS:
            end = time.time() + seconds
            answer = await self.set_expiry(token, end)
            if answer is not grpc.StatusCode.INVALID_ARGUMENT:
                break
        if isinstance(answer, pb.UpdateResponse):
            assert answer.receipt.HasField("effective_time") or token.expired
            # The service judges by this clock.
            await eventually(lambda: time.time() > end + 0.001, "the expiry")
            token.expired = True

    async def expire_and_take(self, token: Model) -> None:
        """Let another token take the name of one that expires."""
        await self.expire(token)
        await self.create(token.account, token.name, token.scope, lost=0)

    async def prolong(self, token: Model) -> None:
        """Let the token live for ever, even if it has expired."""
        if isinstance(await self.set_expiry(token, None), pb.UpdateResponse):
            token.expired = False

    async def set_expiry(self, token: Model, end: float | None) -> Any:
        request = pb.UpdateRequest(
            **self.named(token), update_mask=field_mask_pb2.FieldMask(paths=["expire_time"])
        )
        if end is not None:
            request.token.expire_time.CopyFrom(Timestamp())
            request.token.expire_time.FromNanoseconds(int(end * 1e9))
        changes = end is not None or token.expires
        answer = await self.call("Update", token.account, request, changes=changes)
        if token.deleted:
            assert answer in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT)
        elif answer is grpc.StatusCode.INVALID_ARGUMENT:
            # The time came before the call was handled.
            assert end is not None
        elif token.expired and self.taken(token.account, token.name, token):
            # Another token has taken its name.
            assert answer is grpc.StatusCode.ALREADY_EXISTS
        else:
            assert isinstance(answer, pb.UpdateResponse)
            self.take(token.account, token.name, "Update", token)
            token.named, token.expires = True, end is not None
        return answer

    async def retire(self, token: Model) -> None:
        request = pb.RetireSecretsRequest(**self.named(token))
        changes = any(works for _, works in token.secrets[1:])
        answer = await self.call("RetireSecrets", token.account, request, changes=changes)
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
        # A secret of an expired token would work again if the token were prolonged.
        assert ended == (works and not token.deleted)
        if ended:
            token.secrets[number] = (secret, False)
            token.leaked.add(secret)
            # Calls about several accounts have an entry for each token that they changed.
            self.traces.call(self.account(token.account), "RevokeSecret", token.id)

    async def report(self, token: Model, number: int) -> None:
        secret, works = token.secrets[number % len(token.secrets)]
        request = pb.ReportSecretRequest(secrets=[secret])
        (result,) = (await self.stub.ReportSecret(request, timeout=9)).results
        marked = result.outcome == pb.SECRET_OUTCOME_REPORTED
        assert marked == (works and not token.deleted)
        if marked and secret not in token.leaked:
            token.leaked.add(secret)
            self.traces.call(self.account(token.account), "ReportSecret", token.id)

    async def revoke_and_retire(self, token: Model) -> None:
        await self.rotate(token, grace=True, lost=0, times=1)
        await self.revoke(token, 0)
        await self.retire(token)

    async def delete(self, token: Model) -> None:
        request = pb.DeleteRequest(**self.named(token))
        answer = await self.call("Delete", token.account, request, changes=not token.deleted)
        assert answer.receipt.HasField("effective_time")
        token.deleted = True

    async def delete_all(self, account: str, writers: bool, labels: dict[str, str]) -> None:
        request = pb.DeleteAllRequest(account_id=self.account(account))
        if labels:
            request.filter.label.update(labels)
        if writers:
            request.filter.scope = pb.SCOPE_WRITE
        chosen = [
            t
            for t in self.live(account)
            if (not writers or t.scope == pb.SCOPE_WRITE) and labels.items() <= t.labels.items()
        ]
        answer = await self.stub.DeleteAll(request, timeout=9)
        assert answer.count == len(chosen)
        for token in chosen:
            token.deleted = True
            self.traces.call(self.account(account), "DeleteAll", token.id)
        if not chosen:
            self.traces.call(self.account(account), "DeleteAll", changes=False)

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
                spent = token.limited and token.calls_left < LIMITED_CALLS
                if token.limited and token.calls_left == 0 and expected == "VALID":
                    expected = "RATE_LIMITED"
                if found == "VALID" != expected and secret not in token.ending:
                    raise WrongAcceptError(expected, replace(token, secrets=[]))
                # Checked at the end of the loop: every answer VALID has to be counted.
                agree = agree and answer.token.id == token.id
                if found == "VALID" and token.accepted(secret):
                    self.traces.call(self.account(token.account), "RetireSecrets", token.id)
                # A process that was paused may have lost calls of the limit.
                lost = found == "RATE_LIMITED" and expected == "VALID" and spent
                agree = agree and (found == expected or lost)
        if agree:
            for token in self.tokens:
                token.ending.clear()
        return agree

    async def check_lists(self) -> None:
        for account in ACCOUNTS:
            request = pb.ListRequest(account_id=self.account(account), page_size=500)
            listed = (await self.stub.List(request, timeout=9)).tokens
            assert [
                (t.id, t.name, t.scope, tuple(t.permissions), tuple(t.allowed_networks))
                for t in reversed(listed)
            ] == [(t.id, t.name, t.scope, t.permissions, t.networks) for t in self.live(account)]
            assert [(dict(t.labels), t.HasField("rate_limit")) for t in reversed(listed)] == [
                (t.labels, t.limited) for t in self.live(account)
            ]
            for shown, token in zip(reversed(listed), self.live(account), strict=True):
                hints = [
                    hint_of(secret)
                    for number, (secret, works) in enumerate(token.secrets)
                    if works or number == 0
                ]
                assert [secret.hint for secret in shown.secrets] == hints
                leaked = {hint_of(secret) for secret in token.leaked}
                assert {
                    secret.hint for secret in shown.secrets if secret.HasField("leak_report_time")
                } == leaked & set(hints)
