"""The pages that show and change one token, with scripted answers of Latchkey."""

import asyncio
from datetime import date, timedelta
from typing import Any

import latchkey
import pytest

from tests.helpers.waiting import eventually
from tests.unit.console.scripted import NOW, Scripted, console, dialog, secret, submit, text, token

LOST = latchkey.Unavailable("the answer was lost")
BUSY = latchkey.ResourceExhausted("too many calls")


def edited(**typed: str) -> dict[str, str]:
    """Return the fields of the edit form as a browser sends them."""
    fields = {"name": "deploy job", "scope": "read", "expiry": "keep"}
    return fields | {"description": "", "networks": ""} | typed


async def test_leaked_token_is_marked() -> None:
    """List and details say that a secret was reported as leaked, and no other token has that."""
    leaked = secret("newX", 9, leak_report_time=NOW - timedelta(hours=2))
    for secrets, marked in (((leaked,), True), ((secret("newX", 9),), False)):
        async with console(Scripted(token(secrets=secrets))) as browser:
            rows = text((await browser.get("/")).text)
            details = text(await dialog(browser, "/token?id=tok_1"))
        assert ("Leaked" in rows) == marked
        assert ("was reported as leaked" in details) == marked


async def test_details_show_the_whole_token() -> None:
    """The details show the id, both secrets, networks, permissions, labels and who uses it."""
    client = Scripted(
        token(
            description="Runs <nightly>",
            secrets=(secret("newX", 1), secret("oldX", 30, expire_time=NOW + timedelta(hours=5))),
            allowed_networks=("192.0.2.0/24",),
            permissions=("orders:read",),
            labels={"team": "payments"},
            disable_time=NOW - timedelta(hours=1),
        ),
        (
            latchkey.CallerUsage(
                caller="shop",
                first_used_time=NOW - timedelta(days=3),
                last_used_time=NOW - timedelta(minutes=3),
                days={date(2026, 6, 1): 1_200, date(2026, 5, 31): 34},
            ),
        ),
    )
    async with console(client) as browser:
        said = text(await dialog(browser, "/token?id=tok_1"))
    for words in (
        "tok_1",
        "Runs <nightly>",
        "Disabled since",
        "lk_…newX created 31 May 2026, 12:00 UTC ; the newest",
        "lk_…oldX created 2 May 2026, 12:00 UTC ; ends 1 Jun 2026, 17:00 UTC , in 5 hours",
        "192.0.2.0/24",
        "orders:read",
        "team payments",
        "shop 1,234",
        "3 minutes ago",
        "End the old secret now",
        "Enable",
    ):
        assert words in said


async def test_details_without_usage() -> None:
    """If Latchkey refuses to say who uses a token, the other details are shown."""
    client = Scripted(errors={"get_usage": [latchkey.PermissionDenied("no")]})
    async with console(client) as browser:
        said = text(await dialog(browser, "/token?id=tok_1"))
        assert "did not report who uses this token" in said
        assert "tok_1" in said
        assert "No use is recorded" in text(await dialog(browser, "/token?id=tok_1"))


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ("hour", {"grace": timedelta(hours=1), "retire_on_first_use": False}),
        ("week", {"grace": timedelta(days=7), "retire_on_first_use": False}),
        # A grace of 0 beside the first use would end the old secret at once.
        ("use", {"grace": None, "retire_on_first_use": True}),
        ("now", {"grace": timedelta(), "retire_on_first_use": False}),
    ],
)
async def test_replace_asks_for_what_was_chosen(ends: str, expected: dict[str, Any]) -> None:
    """Each choice has one meaning for Latchkey. The expiry stays unless another is chosen."""
    client = Scripted()
    async with console(client) as browser:
        shown = await dialog(browser, "/replace?id=tok_1")
        made = await submit(browser, "/replace", shown, ends=ends, expiry="keep")
        assert "Copy the new secret now" in made.text
        assert "lk" + "_new" in made.text
    (asked,) = client.called("rotate")
    assert {name: asked[name] for name in expected} == expected
    assert client.called("update") == []


async def test_replace_moves_the_expiry_first() -> None:
    """A later expiry is set before the secret changes, so a failure loses no secret."""
    client = Scripted(errors={"rotate": [BUSY]})
    async with console(client) as browser:
        shown = await dialog(browser, "/replace?id=tok_1")
        failed = await submit(browser, "/replace", shown, ends="day", expiry="30")
        assert failed.status_code == 503
        said = text(failed)
        assert "The service is busy, so nothing was replaced" in said
        assert "has its new expiry already" in said
    assert client.called("update") == [{"expire_time": NOW + timedelta(days=30)}]


async def test_repeated_replace_uses_the_same_request_id() -> None:
    """After a lost answer, the same form repeats the request. A new form makes a new request."""
    client = Scripted(errors={"rotate": [LOST]})
    async with console(client) as browser:
        shown = await dialog(browser, "/replace?id=tok_1")
        doubt = await submit(browser, "/replace", shown, ends="day", expiry="keep")
        assert "may have been replaced" in text(doubt)
        again = await submit(browser, "/replace", doubt.text, ends="day", expiry="keep")
        assert "Copy the new secret now" in again.text
        other = await dialog(browser, "/replace?id=tok_1")
        await submit(browser, "/replace", other, ends="day", expiry="keep")
    first, second, third = (asked["request_id"] for asked in client.called("rotate"))
    assert first == second != third


async def test_double_click_makes_one_request() -> None:
    """Two copies of a form make one request of Latchkey, as its id says. With other choices, the
    form asks again."""
    client = Scripted()
    async with console(client) as browser:
        shown = await dialog(browser, "/replace?id=tok_1")
        await asyncio.gather(
            *(submit(browser, "/replace", shown, ends="day", expiry="keep") for _ in range(2))
        )
        assert len({asked["request_id"] for asked in client.called("rotate")}) == 1
        calls = len(client.called("rotate"))
        changed = await submit(browser, "/replace", shown, ends="now", expiry="keep")
        assert changed.status_code == 409
        assert "already replaced" in text(changed)
    assert len(client.called("rotate")) == calls


async def test_too_many_secrets() -> None:
    """If a token has as many secrets as it may, the form says which step comes first."""
    error = latchkey.FailedPrecondition("too many", reason="TOO_MANY_SECRETS")
    client = Scripted(errors={"rotate": [error]})
    async with console(client) as browser:
        shown = await dialog(browser, "/replace?id=tok_1")
        failed = await submit(browser, "/replace", shown, ends="day", expiry="keep")
        assert failed.status_code == 409
        assert "End its old secrets first" in text(failed)


async def test_forms_of_others_change_nothing() -> None:
    """Without this session's seals, no page changes anything."""
    client = Scripted()
    async with console(client) as browser:
        await browser.get("/")
        for path in ("/replace", "/edit", "/disable", "/enable", "/retire"):
            typed = edited(id="tok_1", ends="now", csrf="forged", form="forged", name="stolen")
            answer = await submit(browser, path, "", **typed)
            assert answer.status_code == 403, path
    changes = ("rotate", "update", "disable", "enable", "retire_secrets")
    assert [client.called(method) for method in changes] == [[]] * 5


async def test_edit_sends_only_what_changed() -> None:
    """A save without a change calls nothing, and one with a change sends only that."""
    client = Scripted()
    async with console(client) as browser:
        shown = await dialog(browser, "/edit?id=tok_1")
        await submit(browser, "/edit", shown, **edited())
        assert client.called("update") == []
        saved = await submit(browser, "/edit", shown, **edited(description="nightly"))
        assert "Saved deploy job" in text(saved)
    assert client.called("update") == [{"description": "nightly"}]


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (latchkey.AlreadyExists("taken"), 409, "already have a token with this name"),
        (latchkey.InvalidArgument("odd"), 422, "The service did not accept this"),
        (BUSY, 503, "The service is busy, so nothing was saved"),
        (LOST, 503, "may have been saved"),
        (
            latchkey.FailedPrecondition("old", reason="FLEET_UPGRADING"),
            503,
            "The service is being upgraded, so nothing was saved",
        ),
        (latchkey.NotFound("gone"), 200, "This token no longer exists"),
    ],
)
async def test_edit_explains_failures(
    error: latchkey.LatchkeyError, status: int, words: str
) -> None:
    """Each failure is explained, and the form keeps its input unless the token is gone."""
    client = Scripted(errors={"update": [error]})
    async with console(client) as browser:
        shown = await dialog(browser, "/edit?id=tok_1")
        failed = await submit(browser, "/edit", shown, **edited(name="new name"))
        assert failed.status_code == status
        assert words in text(failed)
        assert ('value="new name"' in failed.text) is (status != 200)


@pytest.mark.parametrize(
    ("path", "done"),
    [
        ("/disable", "Disabled deploy job"),
        ("/retire", "Ended the old secrets of deploy job"),
    ],
)
async def test_act_shows_its_receipt(path: str, done: str) -> None:
    """A change that takes something away shows how long it took and its receipt."""
    client = Scripted(token(secrets=(secret("aB3x", 1), secret("oldX", 9))))
    async with console(client) as browser:
        shown = await dialog(browser, f"{path}?id=tok_1")
        said = text(await submit(browser, path, shown))
    for words in (done, "1 ms after you confirmed", "2 servers and 0 clients", "revision 7"):
        assert words in said


@pytest.mark.parametrize(
    ("path", "method"), [("/disable", "disable"), ("/retire", "retire_secrets")]
)
async def test_act_explains_failures(path: str, method: str) -> None:
    """A refusal says that nothing changed. A lost answer offers to try again, which is safe."""
    client = Scripted(errors={method: [BUSY, LOST]})
    async with console(client) as browser:
        shown = await dialog(browser, f"{path}?id=tok_1")
        refused = await submit(browser, path, shown)
        assert "Nothing was changed" in text(refused)
        doubt = await submit(browser, path, shown)
        assert "Not confirmed yet" in text(doubt)
        assert "Receipt" in text(await submit(browser, path, doubt.text))


async def test_slow_list_does_not_take_a_later_notice() -> None:
    """A list that was requested before a change leaves its receipt to the list after it."""
    client = Scripted()
    async with console(client) as browser:
        shown = await dialog(browser, "/disable?id=tok_1")
        client.lists += [first := asyncio.Event(), second := asyncio.Event()]
        async with asyncio.timeout(10):
            slow = asyncio.create_task(browser.get("/"))
            await eventually(lambda: len(client.called("list_page")) == 1, "the slow list")
            change = asyncio.create_task(submit(browser, "/disable", shown))
            await eventually(lambda: len(client.called("list_page")) == 2, "the list after it")
            first.set()
            await slow
            second.set()
            assert "Disabled deploy job" in text(await change)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"last_used_time": NOW - timedelta(minutes=3), "last_used_by": "shop"},
            "Last used 3 minutes ago by shop : it will be refused from now on.",
        ),
        (
            {"last_used_time": NOW - timedelta(minutes=3)},
            "Last used 3 minutes ago : it will be refused from now on.",
        ),
        ({}, "No use of this token is recorded."),
    ],
)
async def test_delete_says_who_used_the_token(fields: dict[str, Any], words: str) -> None:
    """Before a deletion, the page says when the token was last used and by which caller."""
    async with console(Scripted(token(**fields))) as browser:
        assert words in text(await dialog(browser, "/delete?id=tok_1"))


async def test_row_shows_use_and_both_secrets() -> None:
    """A row shows the last use with its caller, and the older secrets with their ends."""
    client = Scripted(
        token(
            last_used_time=NOW - timedelta(hours=2),
            last_used_by="shop",
            secrets=(
                secret("aB3x", 1, retire_on_first_use=True),
                secret("oldX", 9, expire_time=NOW + timedelta(days=7)),
                secret("odd4", 19),
            ),
        )
    )
    async with console(client) as browser:
        said = text(await browser.get("/"))
    for words in (
        "Last Used",
        "2 hours ago by shop",
        "lk_…oldX ends 8 Jun 2026, 12:00 UTC , in 7 days",
        "lk_…odd4 ends when the new one is first used",
        "End the old secrets now",
    ):
        assert words in said


async def test_forms_offer_only_lifetimes_that_latchkey_allows() -> None:
    """The forms for a new token, for changes and for a new secret offer only what is allowed, and
    name the limit. Without an answer about it, they offer everything."""
    limits = latchkey.Limits(max_ttl=timedelta(days=3), require_expiry=True)
    client = Scripted(limits=limits)
    async with console(client) as browser:
        for path in ("/new", "/edit?id=tok_1", "/replace?id=tok_1"):
            shown = await dialog(browser, path)
            assert "at most 3 days here" in text(shown)
            for refused in ('value="never"', 'value="30"', 'value="90"', 'value="week"'):
                assert refused not in shown
            assert 'name="expiry" value="259200s"' in shown
        assert 'max="2026-06-03"' in await dialog(browser, "/edit?id=tok_1")

        replaced = await dialog(browser, "/replace?id=tok_1")
        await submit(browser, "/replace", replaced, ends="day", expiry="259200s")
        assert client.called("update") == [{"expire_time": NOW + timedelta(days=3)}]

        client.errors["get_limits"] = [latchkey.PermissionDenied("no")]
        assert 'value="never"' in await dialog(browser, "/new")


async def test_lifetime_that_became_too_long() -> None:
    """If the limit has changed since the form was shown, the page names it, and where a form has a
    field for the expiry, there."""
    refusal = latchkey.InvalidArgument("no", reason="EXPIRY_TOO_LATE")
    refusal.metadata = {"max_ttl_seconds": "259200"}
    refusal.field_violations = (
        latchkey.FieldViolation("token.expire_time", "is too late for this service"),
    )
    client = Scripted(errors={"update": [refusal, refusal]})
    async with console(client) as browser:
        shown = await dialog(browser, "/edit?id=tok_1")
        answer = await submit(browser, "/edit", shown, **edited(expiry="90"))
        assert answer.status_code == 422
        assert 'id="error-expiry"' in answer.text
        assert "The expiry is too late for this service." in text(answer)

        shown = await dialog(browser, "/replace?id=tok_1")
        answer = await submit(browser, "/replace", shown, ends="day", expiry="90")
        assert answer.status_code == 400
        assert "longer than allowed" in text(answer)
        assert "at most 3 days here" in text(answer)
        assert not client.called("rotate")
