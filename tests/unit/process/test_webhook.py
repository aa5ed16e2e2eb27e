"""The messages of the webhook, and when it tries again."""

import json
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID

import httpx2
import pytest
from latchkey_service.process import webhook
from latchkey_service.process.webhook import Deliverer, body_of, delay_seconds
from latchkey_service.tokens.event_store import Event
from standardwebhooks import Webhook, WebhookVerificationError

OLD, NEW = "whsec_" + "QUJD" * 8, "whsec_" + "REVG" * 8
EVENT = Event(
    *(1, UUID(int=7), "leaked", datetime(2026, 6, 1, 12, tzinfo=UTC), "acme", "tok_1", "n\u00e4me"),
    *(None, "shop", 1),
)


class Store:
    """Has one event that is due."""

    def __init__(self) -> None:
        self.due, self.removed, self.postponed = [EVENT], [0][:0], [0.0][:0]

    async def claim(self, _: int, __: float) -> list[Event]:
        return self.due

    async def remove(self, ids: list[int]) -> None:
        self.removed += ids

    async def postpone(self, delays: list[tuple[int, float]], _: int) -> list[Any]:
        self.postponed += [seconds for _, seconds in delays]
        return []


async def delivered(status: int, secrets: list[str]) -> tuple[Store, list[httpx2.Request]]:
    """Deliver the event to a receiver that answers with this status."""
    requests: list[httpx2.Request] = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        requests.append(request)
        return httpx2.Response(status, headers={"location": "https://example.com/elsewhere"})

    client = httpx2.AsyncClient(transport=httpx2.MockTransport(handle))
    store = Store()
    deliverer = Deliverer(cast("Any", store), "https://example.com/", secrets, 3, client)
    await deliverer.deliver_once()
    await deliverer.close()
    return store, requests


async def test_message() -> None:
    """A message is signed with each secret, so that receivers with either accept it, and has the
    same id on each attempt."""
    _, (request,) = await delivered(200, [NEW, OLD])
    for secret in (NEW, OLD):
        event = Webhook(secret).verify(request.content, dict(request.headers))
    assert event == {
        "type": "token.leaked",
        "timestamp": "2026-06-01T12:00:00.000000Z",
        "data": {
            "account_id": "acme",
            "token_id": "tok_1",
            "name": "n\u00e4me",
            "expire_time": None,
            "caller": "shop",
        },
    }
    assert request.headers["webhook-id"] == f"msg_{'0' * 31}7"
    with pytest.raises(WebhookVerificationError):
        Webhook(OLD[:-4]).verify(request.content, dict(request.headers))
    with pytest.raises(WebhookVerificationError):
        Webhook(OLD).verify(request.content + b" ", dict(request.headers))


@pytest.mark.parametrize(
    ("status", "accepted"),
    [(200, True), (202, True), (204, True), (301, False), (307, False), (404, False), (500, False)],
)
async def test_what_counts_as_accepted(status: int, accepted: bool) -> None:
    """Only a status 2xx is accepted, and a redirect is not followed."""
    store, requests = await delivered(status, [NEW])
    assert len(requests) == 1
    assert store.removed == ([1] if accepted else [])
    assert len(store.postponed) == (0 if accepted else 1)


def test_back_off() -> None:
    """The delays double up to an hour, and are spread over their second half."""
    assert [delay_seconds(n, 0.0) for n in (1, 2, 3, 10, 11, 1_000)] == [
        *(5.0, 10.0, 20.0, 2_560.0, 3_600.0, 3_600.0)
    ]
    assert delay_seconds(2, 0.5) == 7.5
    assert delay_seconds(1_000, 0.999) > 1_800


def test_body_is_compact_json() -> None:
    """The body is JSON without white space, in UTF-8."""
    body = body_of(EVENT)
    assert json.loads(body)["data"]["name"] == "n\u00e4me"
    assert ": " not in body


async def test_an_event_without_a_message_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the message of one event cannot be made, the others of its claim are delivered, and that
    one is postponed like one that the receiver refuses."""
    bad = EVENT._replace(id=2)

    def body(event: Event) -> str:
        if event is bad:
            raise ValueError
        return body_of(event)

    monkeypatch.setattr(webhook, "body_of", body)
    client = httpx2.AsyncClient(transport=httpx2.MockTransport(lambda _: httpx2.Response(200)))
    store = Store()
    store.due = [bad, EVENT]
    deliverer = Deliverer(cast("Any", store), "https://example.com/", [NEW], 3, client)
    await deliverer.deliver_once()
    await deliverer.close()
    assert store.removed == [EVENT.id]
    assert len(store.postponed) == 1
