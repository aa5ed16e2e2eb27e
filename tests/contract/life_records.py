"""The traces that the life of tokens leaves, as the contract defines them: uses and audit entries.

`Traces` is the reference for both. It compares them with the service at the end, because uses and
the entries of refused calls are written a little later.
"""

from collections import Counter
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from latchkey_proto.v1 import audit_service_pb2 as audit_pb
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.contract.life_model import Model, hint_of
from tests.helpers.waiting import WAIT_SECONDS, eventually

__all__ = ["Traces", "code_of", "reason_of"]

# The service writes uses and audit entries every few seconds, and a comparison of an account takes
# several calls.
_PAUSE_SECONDS = 0.2
_METHOD = "/latchkey.v1.TokenService/"
# The methods whose calls the model makes. Those that only read are sampled.
_CHANGES = frozenset(
    (
        *("Create", "Delete", "DeleteAll", "Disable", "Enable", "Import", "ReportSecret"),
        *("RetireSecrets", "RevokeSecret", "Rotate", "Update"),
    )
)
# An entry: method, token, code and reason.
Entry = tuple[str, str, int, str]


class Traces:
    """The uses and audit entries that the service must have."""

    def __init__(self, within: float = WAIT_SECONDS) -> None:
        self._within = within
        self._entries: dict[str, Counter[Entry]] = {}
        # Those of calls that change nothing, of which some are counted together.
        self._others: dict[str, Counter[Entry]] = {}
        self._tokens: list[tuple[str, Model]] = []

    def has(self, account: str, token: Model) -> None:
        """Compare the uses of this token, too."""
        self._tokens.append((account, token))

    def call(
        self,
        account: str,
        method: str,
        token_id: str = "",
        code: int = 0,
        reason: str = "",
        *,
        changes: bool = True,
    ) -> None:
        """A call that changes something has one entry, any other at most one."""
        for entries in (self._entries, self._others):
            entries.setdefault(account, Counter())
        entries = self._entries if changes and not code else self._others
        entries[account][(method, token_id, code, reason)] += 1

    async def compare(self, stub: Any, audit: Any) -> None:
        """Raise AssertionError if the service's uses or audit entries are not as expected."""
        for account, token in self._tokens:
            if not token.deleted:
                await self._compare_uses(stub, account, token)
        for account, expected in self._entries.items():

            async def same(account: str = account, expected: Counter[Entry] = expected) -> bool:
                found = await _entries(audit, account)
                assert not expected - found
                assert not found - expected - self._others[account]
                return True

            await eventually(same, "the audit entries", self._within, _PAUSE_SECONDS)

    async def _compare_uses(self, stub: Any, account: str, token: Model) -> None:
        async def same() -> bool:
            usage = await stub.GetUsage(
                pb.GetUsageRequest(account_id=account, id=token.id), timeout=9
            )
            counts = {u.caller: sum(day.count for day in u.days) for u in usage.callers}
            assert counts.get("", 0) <= token.uses, (counts, token.uses)
            return counts == ({"": token.uses} if token.uses else {})

        await eventually(same, f"{token.uses} uses", self._within, _PAUSE_SECONDS)
        shown = (await stub.Get(pb.GetRequest(account_id=account, id=token.id), timeout=9)).token
        assert shown.HasField("last_used_time") == (token.uses > 0)
        used = {hint_of(secret) for secret in token.used_secrets}
        for secret in shown.secrets:
            assert secret.HasField("last_used_time") == (secret.hint in used)


async def _entries(audit: Any, account: str) -> Counter[Entry]:
    found: Counter[Entry] = Counter()
    page_token = ""
    while True:
        request = audit_pb.AuditServiceListRequest(
            account_id=account, page_size=500, page_token=page_token
        )
        page = await audit.List(request, timeout=9)
        for entry in page.entries:
            method = entry.method.removeprefix(_METHOD)
            if method in _CHANGES:
                found[(method, entry.token_id, entry.code, entry.reason)] += entry.calls
        page_token = page.next_page_token
        if not page_token:
            return found


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """Return the reason in the details of a status."""
    metadata = dict(tuple(error.trailing_metadata() or ()))
    info = error_details_pb2.ErrorInfo()
    for detail in status_pb2.Status.FromString(metadata["grpc-status-details-bin"]).details:
        if detail.Unpack(info):
            return info.reason
    raise AssertionError(f"no reason: {error}")


def code_of(status: grpc.StatusCode) -> int:
    """Return the number of a status."""
    number: int = status.value[0]
    return number
