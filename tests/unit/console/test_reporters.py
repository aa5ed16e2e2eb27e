"""The details of a leaked token: what was reported, when and by whom."""

import itertools
from datetime import timedelta
from typing import Any, cast

import latchkey
import pytest
from latchkey_console.reporters import REFUSED_SECONDS, Reporters

from tests.unit.console.scripted import NOW, Scripted, console, dialog, secret, text, token

BUSY = latchkey.ResourceExhausted("too many calls")
LEAK = NOW - timedelta(hours=2)


def reported(method: str, caller: str, seconds: float = 0.0) -> latchkey.AuditEntry:
    """Return an entry of the audit log, this long after the report."""
    return latchkey.AuditEntry(
        id="e1",
        time=LEAK + timedelta(seconds=seconds),
        caller=caller,
        method=f"/latchkey.v1.TokenService/{method}",
        account_id="acme",
        token_id="tok_1",
        peer="",
        request_id="",
        outcome=latchkey.Outcome.OK,
        code=0,
        reason="",
        calls=1,
    )


@pytest.mark.parametrize(
    ("secrets", "said"),
    [
        ((secret("newX", 9, leak_report_time=LEAK),), "2 hours ago, by scanner . It still works."),
        (
            (secret("newX", 9, leak_report_time=LEAK, expire_time=LEAK),),
            "by scanner . It has been refused since 1 Jun 2026, 10:00 UTC .",
        ),
        (
            (
                secret("newX", 1),
                secret("oldX", 9, leak_report_time=LEAK, expire_time=NOW + timedelta(hours=1)),
            ),
            "by scanner . It works until 1 Jun 2026, 13:00 UTC . The newest secret was not",
        ),
    ],
)
async def test_details_say_what_leaked(
    secrets: tuple[latchkey.TokenSecret, ...], said: str
) -> None:
    """The details say which secret was reported, when and by whom, and whether it still works."""
    entries = (reported("Update", "somebody"), reported("ReportSecret", "scanner", 0.2))
    client = Scripted(token(secrets=secrets), entries=entries)
    async with console(client) as browser:
        details = text(await dialog(browser, "/token?id=tok_1"))
    assert said in details
    assert f"The secret lk_…{'oldX' if len(secrets) > 1 else 'newX'} was reported" in details


async def test_details_without_the_audit_log() -> None:
    """If the console may not read the audit log, the details do not say who reported the leak, and
    it does not soon ask again, because the log contains an entry for each refusal. After other
    errors, it asks again."""
    leaked = token(secrets=(secret("newX", 9, leak_report_time=LEAK),))
    errors: list[latchkey.LatchkeyError] = [BUSY, latchkey.PermissionDenied("no")]
    client = Scripted(leaked, errors={"audit_page": errors})
    async with console(client) as browser:
        for _ in range(4):
            details = text(await dialog(browser, "/token?id=tok_1"))
            assert "2 hours ago. It still works." in details
    assert len(client.called("audit_page")) == 2


async def test_refusal_of_the_audit_log_holds_for_one_account() -> None:
    """If the console may not read the audit log of one account, the details of another account's
    token still say who reported the leak."""
    leaked = token(secrets=(secret("newX", 9, leak_report_time=LEAK),))
    client = Scripted(
        leaked,
        errors={"audit_page": [latchkey.PermissionDenied("no")]},
        entries=(reported("RevokeSecret", "scanner"),),
    )
    proxy: dict[str, Any] = {
        "account": None,
        "account_header": "X-Account",
        "trusted_proxies": ("127.0.0.1",),
    }
    shown = []
    async with console(client, **proxy) as browser:
        for account in ("refused", "allowed", "refused", "allowed"):
            browser.headers["x-account"] = account
            shown.append("by scanner" in text(await dialog(browser, "/token?id=tok_1")))
    assert shown == [False, True, False, True]
    asked = [fields["wanted"].account_id for fields in client.called("audit_page")]
    assert asked == ["refused", "allowed", "allowed"]


async def test_refusal_of_the_audit_log_ends() -> None:
    """Some minutes after a refusal, the details ask the audit log again: the policy may have
    changed."""
    leaked = token(secrets=(secret("newX", 9, leak_report_time=LEAK),))
    client = Scripted(
        leaked,
        errors={"audit_page": [latchkey.PermissionDenied("no")]},
        entries=(reported("RevokeSecret", "scanner"),),
    )
    clock = 1_000.0
    async with console(client, lambda: clock) as browser:
        shown = []
        for moment in (0.0, REFUSED_SECONDS - 1, REFUSED_SECONDS):
            clock = 1_000.0 + moment
            shown.append("by scanner" in text(await dialog(browser, "/token?id=tok_1")))
    assert shown == [False, False, True]


async def test_refusals_of_the_audit_log_are_bounded() -> None:
    """The console remembers refusals of a limited number of accounts. It forgets the oldest."""
    errors: list[latchkey.LatchkeyError] = [latchkey.PermissionDenied("no") for _ in range(9)]
    client = Scripted(errors={"audit_page": errors})
    moments = itertools.count()
    reporters = Reporters(
        cast("latchkey.Client", client), lambda: float(next(moments)), accounts_max=3
    )
    leaked = token(secrets=(secret("newX", 9, leak_report_time=LEAK),))
    for account in ("a", "b", "c", "d", "d", "c", "b", "a"):
        assert await reporters.of(account, leaked) == {}
    asked = [fields["wanted"].account_id for fields in client.called("audit_page")]
    assert asked == ["a", "b", "c", "d", "a"]
