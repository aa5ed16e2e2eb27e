"""Finds who reported a token's leaked secrets, in the audit log."""

import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

import latchkey

__all__ = ["REFUSED_SECONDS", "Reporters"]

_log = logging.getLogger("latchkey.console")

# How long the answer of the policy to one account counts. Each refusal makes an entry in the audit
# log. After a change to the policy or the credential, nobody should wait longer for the names.
REFUSED_SECONDS: Final = 600.0
# Accounts whose refusals are remembered. One takes about a hundred bytes.
ACCOUNTS_MAX: Final = 10_000
# The methods that report secrets as leaked, as the audit log names them.
_REPORTS: Final = tuple(
    f"/latchkey.v1.TokenService/{name}" for name in ("ReportSecret", "RevokeSecret")
)
# The largest difference between the time of a report and that of its audit entry, which is rounded.
_MARGIN: Final = timedelta(seconds=1)
# How many entries about one token to read. A token has fewer reports.
_ENTRIES_MAX: Final = 50


class Reporters:
    """Reads the audit log of one account at a time, with the client's credential.

    A policy may forbid the console to read the log of some accounts, or of all. After a refusal,
    this does not ask for the same account again for REFUSED_SECONDS.
    """

    def __init__(
        self,
        client: latchkey.Client,
        monotonic: Callable[[], float],
        *,
        accounts_max: int = ACCOUNTS_MAX,
    ) -> None:
        self._client = client
        self._monotonic = monotonic
        self._accounts_max = accounts_max
        # When the refusal of each account ends, the oldest first.
        self._refused_until: dict[str, float] = {}

    async def of(self, account_id: str, token: latchkey.Token) -> dict[datetime, str]:
        """Return who reported the token's leaked secrets, by the time of the report.

        Returns nobody if the audit log cannot be read.
        """
        times = {s.leak_report_time for s in token.secrets if s.leak_report_time is not None}
        if not times or self._monotonic() < self._refused_until.get(account_id, 0.0):
            return {}
        wanted = latchkey.AuditFilter(
            account_id=account_id,
            token_id=token.id,
            outcome=latchkey.Outcome.OK,
            start_time=min(times) - _MARGIN,
            end_time=max(times) + _MARGIN,
        )
        try:
            page = await self._client.audit_page(wanted, page_size=_ENTRIES_MAX)
        except latchkey.PermissionDenied:
            self._refuse(account_id)
            return {}
        except latchkey.LatchkeyError as error:
            _log.info("reporters are not shown: %s", error.code.name)
            return {}
        reports = [entry for entry in page.entries if entry.method in _REPORTS]
        return {
            time: entry.caller
            for time in times
            for entry in reports
            if abs(entry.time - time) <= _MARGIN and entry.caller
        }

    def _refuse(self, account_id: str) -> None:
        # Removed first, so that the account becomes the newest.
        self._refused_until.pop(account_id, None)
        self._refused_until[account_id] = self._monotonic() + REFUSED_SECONDS
        if len(self._refused_until) > self._accounts_max:
            del self._refused_until[next(iter(self._refused_until))]
