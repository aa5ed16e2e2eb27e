"""The methods of `Client` that change existing tokens.

This module builds their requests. `client.py` contains the other methods, and `_connection` the
calls.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID, uuid4

from google.protobuf.field_mask_pb2 import FieldMask
from latchkey_proto.v1 import token_service_pb2 as pb

from latchkey import _convert, _rate_messages
from latchkey._connection import Connection
from latchkey._filters import filter_out
from latchkey._imported import ImportedToken, ImportResult
from latchkey._rate_limit import RateLimit
from latchkey.errors import InternalError, invalid
from latchkey.filters import TokenFilter
from latchkey.models import (
    UNCHANGED,
    Change,
    Deletions,
    Revocation,
    RotatedToken,
    Scope,
    SecretOutcome,
    Unchanged,
)
from latchkey.secret import Secret

_OUTCOMES: Final[Mapping[int, SecretOutcome]] = {
    pb.SECRET_OUTCOME_ENDED: SecretOutcome.ENDED,
    pb.SECRET_OUTCOME_ENDED_BEFORE: SecretOutcome.ENDED_BEFORE,
    pb.SECRET_OUTCOME_UNKNOWN: SecretOutcome.UNKNOWN,
    pb.SECRET_OUTCOME_MALFORMED: SecretOutcome.MALFORMED,
    pb.SECRET_OUTCOME_REPORTED: SecretOutcome.REPORTED,
}


class LifecycleCalls(Connection):
    """A part of `Client`.

    A change that takes something away waits, as `delete` does, until it is in effect everywhere,
    and then has a receipt. With `no_wait`, it returns as soon as the change is stored, and its
    receipt has no effective_time. After Unavailable or DeadlineExceeded the change may be stored
    but is not confirmed. With the reason CHANGE_NOT_CONFIRMED it is stored. All methods are safe to
    repeat.
    """

    async def update(
        self,
        account_id: str,
        token_id: str,
        *,
        name: str | Unchanged = UNCHANGED,
        scope: Scope | Unchanged = UNCHANGED,
        expire_time: datetime | Unchanged | None = UNCHANGED,
        labels: Mapping[str, str] | Unchanged = UNCHANGED,
        description: str | Unchanged = UNCHANGED,
        allowed_networks: Iterable[str] | Unchanged = UNCHANGED,
        permissions: Iterable[str] | Unchanged = UNCHANGED,
        rate_limit: RateLimit | Unchanged | None = UNCHANGED,
        no_wait: bool = False,
        timeout_seconds: float | None = None,
    ) -> Change:
        """Change the given fields of a token. Labels, networks and permissions are replaced whole.

        `expire_time=None` makes the token valid for ever. An empty `allowed_networks` permits any
        address, and empty `permissions` take all permissions away. `rate_limit=None` removes the
        limit. The result has a receipt if the change takes something away. Raises NotFound, and
        AlreadyExists if the name is taken.
        """

        def request() -> pb.UpdateRequest:
            token = pb.Token()
            paths: list[str] = []
            if not isinstance(name, Unchanged):
                paths.append("name")
                token.name = name
            if not isinstance(scope, Unchanged):
                paths.append("scope")
                if not isinstance(scope, Scope):  # None would request a token without a scope
                    raise TypeError(f"scope must be a Scope, not {type(scope).__name__}")
                token.scope = _convert.scope_out(scope, "scope")
            if not isinstance(expire_time, Unchanged):
                paths.append("expire_time")
                if expire_time is not None:
                    token.expire_time.CopyFrom(_convert.time_out(expire_time, "expire_time"))
            if not isinstance(labels, Unchanged):
                paths.append("labels")
                token.labels.update(labels)
            if not isinstance(description, Unchanged):
                paths.append("description")
                token.description = description
            if not isinstance(allowed_networks, Unchanged):
                paths.append("allowed_networks")
                networks = _convert.several(allowed_networks, "allowed_networks")
                token.allowed_networks.extend(networks)
            if not isinstance(permissions, Unchanged):
                paths.append("permissions")
                token.permissions.extend(_convert.several(permissions, "permissions"))
            if not isinstance(rate_limit, Unchanged):
                paths.append("rate_limit")
                if rate_limit is not None:
                    token.rate_limit.CopyFrom(_rate_messages.rate_limit_out(rate_limit))
            if not paths:
                raise invalid("update_mask", "give at least one field to change")
            return pb.UpdateRequest(
                account_id=account_id,
                id=token_id,
                token=token,
                update_mask=FieldMask(paths=paths),
                no_wait=no_wait,
            )

        answer = await self._call(
            "Update", self._rpcs().Update, _convert.build(request), timeout_seconds
        )
        return _change_in(answer)

    async def disable(
        self,
        account_id: str,
        token_id: str,
        *,
        no_wait: bool = False,
        timeout_seconds: float | None = None,
    ) -> Change:
        """Refuse all secrets of a token, with the verdict DISABLED, until `enable`.

        Raises NotFound.
        """
        request = _convert.build(
            lambda: pb.DisableRequest(account_id=account_id, id=token_id, no_wait=no_wait)
        )
        answer = await self._call("Disable", self._rpcs().Disable, request, timeout_seconds)
        return _change_in(answer)

    async def enable(
        self, account_id: str, token_id: str, *, timeout_seconds: float | None = None
    ) -> Change:
        """End a `disable`. Returns at once, without a receipt. Verifiers follow shortly after.

        Raises NotFound.
        """
        request = _convert.build(lambda: pb.EnableRequest(account_id=account_id, id=token_id))
        answer = await self._call("Enable", self._rpcs().Enable, request, timeout_seconds)
        return _change_in(answer)

    async def rotate(
        self,
        account_id: str,
        token_id: str,
        *,
        grace: timedelta | None = None,
        retire_on_first_use: bool = False,
        request_id: UUID | None = None,
        no_wait: bool = False,
        timeout_seconds: float | None = None,
    ) -> RotatedToken:
        """Give a token a new secret, which is never shown again, and end the older ones.

        They work until `grace` has passed (at most 365 days), or until the new secret is first used
        if `retire_on_first_use` is set, whichever comes first. With neither, they are dead when
        this returns.

        A repeated attempt returns another new secret in place of the one that nobody received. See
        `create` for `request_id`. Raises NotFound, and FailedPrecondition with the reason
        TOO_MANY_SECRETS if more than 5 secrets would work.
        """
        request = _convert.build(
            lambda: pb.RotateRequest(
                account_id=account_id,
                id=token_id,
                grace=None if grace is None else _convert.duration_out(grace),
                retire_on_first_use=retire_on_first_use,
                request_id=str(request_id or uuid4()),
                no_wait=no_wait,
            )
        )
        answer = await self._call("Rotate", self._rpcs().Rotate, request, timeout_seconds)
        return RotatedToken(
            token=_convert.token_in(answer.token),
            secret=Secret(answer.secret),
            receipt=_convert.receipt_of(answer),
        )

    async def retire_secrets(
        self,
        account_id: str,
        token_id: str,
        *,
        no_wait: bool = False,
        timeout_seconds: float | None = None,
    ) -> Change:
        """End all secrets of a token except the newest. Raises NotFound."""
        request = _convert.build(
            lambda: pb.RetireSecretsRequest(account_id=account_id, id=token_id, no_wait=no_wait)
        )
        answer = await self._call(
            "RetireSecrets", self._rpcs().RetireSecrets, request, timeout_seconds
        )
        return _change_in(answer)

    async def revoke_secrets(
        self,
        secrets: Iterable[str | Secret],
        *,
        no_wait: bool = False,
        timeout_seconds: float | None = None,
    ) -> Revocation:
        """End 1 to 1,000 leaked secrets by possession, in one call. Their tokens stay.

        Any strings are allowed. The outcomes come in the order of the secrets. Needs the role
        `revoker` if the service has a policy.
        """
        texts = [_convert.secret_out(secret) for secret in _convert.several(secrets, "secrets")]
        request = pb.RevokeSecretRequest(secrets=texts, no_wait=no_wait)
        answer = await self._call(
            "RevokeSecret", self._rpcs().RevokeSecret, request, timeout_seconds
        )
        return Revocation(
            outcomes=_outcomes_in(answer, len(texts)), receipt=_convert.receipt_of(answer)
        )

    async def report_secrets(
        self, secrets: Iterable[str | Secret], *, timeout_seconds: float | None = None
    ) -> tuple[SecretOutcome, ...]:
        """Mark 1 to 1,000 secrets as leaked, in one call, without ending them.

        Their tokens then have a `leak_report_time`. Any strings are allowed. The outcomes come in
        the order of the secrets. Needs the role `revoker` if the service has a policy.
        """
        texts = [_convert.secret_out(secret) for secret in _convert.several(secrets, "secrets")]
        answer = await self._call(
            "ReportSecret",
            self._rpcs().ReportSecret,
            pb.ReportSecretRequest(secrets=texts),
            timeout_seconds,
        )
        return _outcomes_in(answer, len(texts))

    async def import_tokens(
        self,
        tokens: Iterable[ImportedToken],
        *,
        validate_only: bool = False,
        timeout_seconds: float | None = None,
    ) -> tuple[ImportResult, ...]:
        """Create 1 to 1,000 tokens for existing secrets, from the hashes of these secrets.

        The results come in the order of the tokens. A secret that a token already has, or had, is
        not imported again, so this is safe to repeat. With `validate_only`, it imports nothing.
        Needs the role `importer` for all accounts if the service has a policy.
        """
        rows = [_convert.imported_out(token) for token in tokens]
        request = pb.ImportRequest(tokens=rows, validate_only=validate_only)
        answer = await self._call("Import", self._rpcs().Import, request, timeout_seconds)
        if len(answer.results) != len(rows):
            # If results cannot be matched to tokens, none of them can be used.
            raise InternalError("The service did not answer for every token of a batch.")
        return tuple(_convert.import_result_in(result) for result in answer.results)

    async def delete_all(
        self,
        account_id: str,
        wanted: TokenFilter = TokenFilter(),  # noqa: B008 - immutable
        *,
        dry_run: bool = False,
        no_wait: bool = False,
        timeout_seconds: float | None = None,
    ) -> Deletions:
        """Delete all live tokens of an account, or those that match `wanted`, for good.

        Deletes up to 1,000 tokens at once, the oldest first. Call it again while the result says
        `more`. With `dry_run`, it deletes nothing, and returns how many tokens match and the first
        500 of them.
        """
        request = _convert.build(
            lambda: pb.DeleteAllRequest(
                account_id=account_id,
                filter=filter_out(wanted),
                dry_run=dry_run,
                no_wait=no_wait,
            )
        )
        answer = await self._call("DeleteAll", self._rpcs().DeleteAll, request, timeout_seconds)
        return Deletions(
            count=answer.count,
            tokens=tuple(_convert.token_in(token) for token in answer.tokens),
            receipt=_convert.receipt_of(answer),
            more=answer.more,
        )


def _change_in(
    answer: pb.UpdateResponse | pb.DisableResponse | pb.EnableResponse | pb.RetireSecretsResponse,
) -> Change:
    return Change(token=_convert.token_in(answer.token), receipt=_convert.receipt_of(answer))


def _outcomes_in(
    answer: pb.RevokeSecretResponse | pb.ReportSecretResponse, number: int
) -> tuple[SecretOutcome, ...]:
    if len(answer.results) != number:
        # If results cannot be matched to secrets, none of them can be used.
        raise InternalError("The service did not answer for every secret of a batch.")
    return tuple(
        _OUTCOMES.get(result.outcome, SecretOutcome.UNSPECIFIED) for result in answer.results
    )
