"""The changes that end a token for the questions of these tests, and those questions.

Every token may do all that the verifies ask for. So each change here, and not only Delete, turns
each verdict on it from VALID into another one, and the guarantee for Delete holds for it.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import latchkey

from tests.helpers.imported_keys import imported_key, sha256_of
from tests.history.records import Kind

__all__ = ["CHANGES", "QUESTION", "SCOPE", "Ended", "Subject", "create", "end", "import_", "verify"]

_ADDRESS = "192.0.2.7"
_PERMISSION = "orders:read"
_NETWORKS = ("192.0.2.0/24", "2001:db8::/32")
_PERMISSIONS = (_PERMISSION, "orders:write")
SCOPE = latchkey.Scope.WRITE
QUESTION: dict[str, Any] = {"client_address": _ADDRESS, "permissions": (_PERMISSION,)}
"""What each verify asks for, besides `SCOPE`, in the words of `latchkey.Verifier`."""
# Long enough that it lies in the future when the service checks it on a busy machine. If it does
# not, the change fails. It cannot be repeated: a later expiry would give the token more time.
_EXPIRY_SECONDS = 0.3
_GRACE = timedelta(hours=1)
# As for the verifies after a change (`deleter.DIRECT_TIMEOUT_SECONDS`).
_VERIFY_SECONDS = 4.0


class Subject(NamedTuple):
    """A token that a change ends."""

    account: str
    id: str
    secret: str


class Ended(NamedTuple):
    """The result of a change: whether it is confirmed, and whether it found the token."""

    confirmed: bool
    found: bool = True


async def create(client: latchkey.Client, account: str, name: str) -> latchkey.CreatedToken:
    """Create a token that may do all that the verifies ask for."""
    return await client.create(
        account,
        name,
        SCOPE,
        allowed_networks=_NETWORKS,
        permissions=_PERMISSIONS,
    )


async def import_(client: latchkey.Client, account: str, name: str) -> Subject:
    """Import a token that may do all that the verifies ask for."""
    secret = imported_key()
    token = latchkey.ImportedToken(
        account_id=account,
        name=name,
        scope=SCOPE,
        secret_sha256=sha256_of(secret),
        allowed_networks=_NETWORKS,
        permissions=_PERMISSIONS,
    )
    (result,) = await client.import_tokens([token])
    # The client repeats a call whose answer was lost.
    assert result.outcome in (
        latchkey.ImportOutcome.IMPORTED,
        latchkey.ImportOutcome.EXISTS,
    ), result
    return Subject(account, result.token_id, secret)


async def verify(
    client: latchkey.Client, secret: str, timeout_seconds: float
) -> latchkey.Verification:
    """Ask the service whether the token is VALID for what the verifies ask for."""
    return await client.verify(
        secret,
        SCOPE,
        client_address=_ADDRESS,
        required_permissions=(_PERMISSION,),
        timeout_seconds=timeout_seconds,
    )


async def end(
    kind: Kind, client: latchkey.Client, subject: Subject, *, again: bool = False, **options: Any
) -> Ended:
    """Make one change, once. `again`: whether an earlier attempt may have made it.

    Returns when the change is in effect according to its answer, and for an expiry, when the time
    has come. Raises what the client raises, except NotFound.
    """
    try:
        return await CHANGES[kind](client, subject, again, options)
    except latchkey.NotFound:
        return Ended(confirmed=False, found=False)


def _changed(change: Any) -> Ended:
    # Every change here narrows or may have narrowed, so its answer has a receipt.
    return Ended(change.receipt.effective_time is not None)


async def _delete(client: latchkey.Client, subject: Subject, _again: bool, options: Any) -> Ended:
    receipt = await client.delete(subject.account, subject.id, **options)
    return Ended(receipt.effective_time is not None)


def _update(**values: Any) -> "_Change":
    async def update(
        client: latchkey.Client, subject: Subject, _again: bool, options: Any
    ) -> Ended:
        return _changed(await client.update(subject.account, subject.id, **values, **options))

    return update


async def _expire(client: latchkey.Client, subject: Subject, _again: bool, options: Any) -> Ended:
    expire_time = datetime.now(UTC) + timedelta(seconds=_EXPIRY_SECONDS)
    try:
        change = await client.update(
            subject.account, subject.id, expire_time=expire_time, **options
        )
    except latchkey.InvalidArgument:
        raise latchkey.Unavailable("The time came before the call was handled.") from None
    # The verifiers' clock is this one: they run on this machine. A sleep may end a little early.
    await asyncio.sleep(max(0.0, expire_time.timestamp() - time.time()) + 0.01)
    return _changed(change)


async def _disable(client: latchkey.Client, subject: Subject, _again: bool, options: Any) -> Ended:
    return _changed(await client.disable(subject.account, subject.id, **options))


async def _rotate(client: latchkey.Client, subject: Subject, _again: bool, options: Any) -> Ended:
    rotated = await client.rotate(subject.account, subject.id, grace=timedelta(), **options)
    assert rotated.receipt is not None
    return Ended(rotated.receipt.effective_time is not None)


async def _retire(client: latchkey.Client, subject: Subject, _again: bool, options: Any) -> Ended:
    # The newest secret stays, so the token needs another one. After some attempts, it has as many
    # as it may have.
    with contextlib.suppress(latchkey.FailedPrecondition):
        await client.rotate(subject.account, subject.id, grace=_GRACE)
    return _changed(await client.retire_secrets(subject.account, subject.id, **options))


async def _revoke(client: latchkey.Client, subject: Subject, _again: bool, options: Any) -> Ended:
    revocation = await client.revoke_secrets([subject.secret], **options)
    if revocation.receipt is None:
        return Ended(confirmed=False, found=False)
    return Ended(revocation.receipt.effective_time is not None)


async def _delete_all(
    client: latchkey.Client, subject: Subject, again: bool, options: Any
) -> Ended:
    deletions = await client.delete_all(subject.account, **options)
    if not deletions.count and not again:
        # The library repeats a call that the service could not confirm. The first attempt may have
        # deleted the token.
        answer = await verify(client, subject.secret, _VERIFY_SECONDS)
        if answer.verdict is latchkey.Verdict.UNKNOWN:
            return Ended(confirmed=False, found=False)
    assert deletions.receipt is not None
    return Ended(deletions.receipt.effective_time is not None)


_Change = Callable[[latchkey.Client, Subject, bool, Any], Awaitable[Ended]]

CHANGES: dict[Kind, _Change] = {
    Kind.DELETE: _delete,
    Kind.NARROW_SCOPE: _update(scope=latchkey.Scope.READ),
    Kind.EXPIRE: _expire,
    Kind.NARROW_NETWORKS: _update(allowed_networks=["203.0.113.0/24"]),
    Kind.NARROW_PERMISSIONS: _update(permissions=["orders:list"]),
    Kind.DISABLE: _disable,
    Kind.ROTATE: _rotate,
    Kind.RETIRE_SECRETS: _retire,
    Kind.REVOKE_SECRET: _revoke,
    Kind.DELETE_ALL: _delete_all,
}
