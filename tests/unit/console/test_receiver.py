"""The receiver of leak reports: signatures, keys, labels, bounds and logs, with a scripted
service."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast
from urllib.parse import quote, unquote

import httpx
import httpx2
import latchkey
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from latchkey import SecretOutcome
from latchkey_console.receiver import app as receiver
from latchkey_console.receiver import keys as public_keys
from latchkey_console.receiver.keys import KeysError, PublicKeys, is_signed, parse, read
from latchkey_console.receiver.settings import Action, make
from latchkey_console.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

KEY = ec.generate_private_key(ec.SECP256R1())
OTHER = ec.generate_private_key(ec.SECP256R1())
SECRET = "lk_" + "A" * 57
URL = "https://keys.example.com/secret_scanning"


def document(**keys: Any) -> bytes:
    """Return these private keys' public halves in the format of GitHub's endpoint."""
    entries = [
        {
            "key_identifier": name,
            "key": key.public_key()
            .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            .decode(),
            "is_current": True,
        }
        for name, key in keys.items()
    ]
    return json.dumps({"public_keys": entries}).encode()


def signature(body: bytes, key: ec.EllipticCurvePrivateKey = KEY) -> str:
    return base64.b64encode(key.sign(body, ec.ECDSA(SHA256()))).decode()


class Service:
    """Gives each text the outcome that the test has set for it, or MALFORMED."""

    def __init__(self, **outcomes: SecretOutcome) -> None:
        self.outcomes = outcomes
        self.revoked: list[list[str]] = []
        self.reported: list[list[str]] = []
        self.error: latchkey.LatchkeyError | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def revoke_secrets(self, secrets: Sequence[str]) -> latchkey.Revocation:
        self.revoked.append(list(secrets))
        return latchkey.Revocation(outcomes=self._answer(secrets))

    async def report_secrets(self, secrets: Sequence[str]) -> tuple[SecretOutcome, ...]:
        self.reported.append(list(secrets))
        return self._answer(secrets)

    def _answer(self, secrets: Sequence[str]) -> tuple[SecretOutcome, ...]:
        if self.error is not None:
            raise self.error
        return tuple(self.outcomes.get(text, SecretOutcome.MALFORMED) for text in secrets)


class Endpoint:
    """The partner's endpoint of keys."""

    def __init__(self, answer: bytes, status: int = 200) -> None:
        self.answer, self.status, self.fetches = answer, status, 0
        # If not set, each fetch waits before it answers with what the partner had when it began.
        self.open = asyncio.Event()
        self.open.set()

    def keys(self, fixed: public_keys.Keys, now: list[float]) -> PublicKeys:
        async def handle(request: httpx2.Request) -> httpx2.Response:
            self.fetches += 1
            answer = self.answer
            await self.open.wait()
            if self.status == 0:
                raise httpx2.ConnectError("no", request=request)
            headers = {"location": "https://elsewhere.example.com/"} if self.status == 302 else {}
            return httpx2.Response(self.status, content=answer, headers=headers)

        client = httpx2.AsyncClient(transport=httpx2.MockTransport(handle))
        return PublicKeys(fixed, URL, lambda: now[0], client)


@asynccontextmanager
async def scanner(
    service: Service, action: Action = Action.REVOKE, keys: PublicKeys | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """Run the receiver in this process, without its lifespan."""
    if keys is None:
        # Without a client, each test would load all certification authorities.
        client = httpx2.AsyncClient(transport=httpx2.MockTransport(lambda _: httpx2.Response(404)))
        keys = PublicKeys(parse(document(test=KEY)), None, lambda: 0.0, client)
    settings = make(
        listen="127.0.0.1:0", target="127.0.0.1:1", action=action, keys_url=URL, keys_file=None
    )
    app = receiver.make_app(settings, client=cast("Any", service), keys=keys)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://receiver") as http:
        yield http


async def send(http: httpx.AsyncClient, report: Any, **headers: str) -> httpx.Response:
    body = report if isinstance(report, bytes) else json.dumps(report).encode()
    signed = {
        "github-public-key-identifier": "test",
        "github-public-key-signature": signature(body),
    }
    signed |= {name.replace("_", "-"): value for name, value in headers.items()}
    return await http.post("/", content=body, headers=signed)


def match(token: Any, **fields: Any) -> dict[str, Any]:
    return {"token": token, "type": "latchkey", "url": "", "source": "commit"} | fields


@pytest.mark.parametrize("action", list(Action))
async def test_labels(action: Action) -> None:
    """Each match gets the label of its outcome, and only the chosen action is taken."""
    working = SecretOutcome.ENDED if action is Action.REVOKE else SecretOutcome.REPORTED
    service = Service(
        works=working,
        ended=SecretOutcome.ENDED_BEFORE,
        unknown=SecretOutcome.UNKNOWN,
        newer=SecretOutcome.UNSPECIFIED,
    )
    tokens = ["works", "ended", "unknown", "text", "newer"]
    async with scanner(service, action) as http:
        answer = await send(http, [match(token) for token in tokens])
    assert answer.status_code == 200
    assert [(label["token_raw"], label["label"]) for label in answer.json()] == [
        ("works", "true_positive"),
        ("ended", "true_positive"),
        ("unknown", "false_positive"),
        ("text", "false_positive"),
    ]
    assert {label["token_type"] for label in answer.json()} == {"latchkey"}
    done, other = service.revoked, service.reported
    if action is Action.MARK:
        done, other = other, done
    assert (done, other) == ([tokens], [])


async def test_one_bad_match_does_not_stop_the_others() -> None:
    """Elements without a text `token` that UTF-8 can encode are skipped. Wrong types and characters
    of other fields do not matter."""
    service = Service(works=SecretOutcome.ENDED)
    report: list[Any] = [
        None,
        7,
        "works",
        [],
        {},
        {"token": 7},
        # No UTF-8 exists for a lone surrogate, so no message to the service can have one.
        match("\ud800"),
        match("works\udfff"),
        match("works", type=7, url=None, source=[]),
        match("works", type="\ud800", url="\ud800"),
    ]
    async with scanner(service) as http:
        answer = await send(http, report)
    assert service.revoked == [["works", "works"]]
    assert [label["label"] for label in answer.json()] == ["true_positive", "true_positive"]


async def test_unsigned_reports_are_refused() -> None:
    """Only a signature of exactly these bytes by the named key is accepted, and only then is the
    service called."""
    service = Service()
    body = json.dumps([match(SECRET)]).encode()
    async with scanner(service) as http:
        for headers in (
            {"github_public_key_signature": ""},
            {"github_public_key_identifier": ""},
            {"github_public_key_identifier": "x" * 1_000},
            {"github_public_key_identifier": "unknown"},
            {"github_public_key_signature": signature(body, OTHER)},
            {"github_public_key_signature": signature(body + b" ")},
            {"github_public_key_signature": "no base64!"},
            {"github_public_key_signature": signature(body)[:-4]},
            {"github_public_key_signature": "A" * 10_000},
        ):
            assert (await send(http, body, **headers)).status_code == 401, headers
        assert (await http.post("/", content=body)).status_code == 401
        assert service.revoked == []
        assert (await send(http, body)).status_code == 200


@pytest.mark.parametrize(
    ("report", "status"),
    [
        (b"", 400),
        (b"{}", 400),
        (b"[" * 100_000, 400),
        (b"\xff", 400),
        ([{}] * (receiver.MATCHES_MAX + 1), 400),
        (b" " * (receiver.BODY_BYTES_MAX + 1), 413),
        ([], 200),
    ],
    ids=["empty", "object", "nested", "no UTF-8", "too many", "too long", "no match"],
)
async def test_reports_of_the_wrong_form(report: Any, status: int) -> None:
    """A body that is not an array, or is too large, is refused without a call."""
    service = Service()
    async with scanner(service) as http:
        assert (await send(http, report)).status_code == status
    assert service.revoked == []


async def test_batches_fit_the_service() -> None:
    """A large report becomes calls within the service's limits; overlong texts are not sent."""
    tokens = ["🔑" * 50] * 700 + ["y"] * 2_000 + ["z" * 10_000]
    service = Service(y=SecretOutcome.ENDED)
    async with scanner(service) as http:
        answer = await send(http, [match(token) for token in tokens])
    assert sum(map(len, service.revoked)) == len(tokens)
    assert max(map(len, service.revoked)) <= 1_000
    assert max(sum(len(text.encode()) for text in batch) for batch in service.revoked) <= 100_000
    assert service.revoked[-1][-1] == ""
    labels = [label["label"] for label in answer.json()]
    assert labels == ["false_positive"] * 700 + ["true_positive"] * 2_000 + ["false_positive"]


async def test_outage(caplog: pytest.LogCaptureFixture) -> None:
    """If Latchkey does not answer, the scanner is asked to send the report again."""
    service = Service()
    service.error = latchkey.Unavailable("down")
    async with scanner(service) as http:
        answer = await send(http, [match(SECRET)])
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")
    assert SECRET not in caplog.text + answer.text


async def test_log_has_the_place_but_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    """The log says where a leaked secret was found, unless that contains a secret or a control
    character, or is very long."""
    service = Service()
    service.outcomes[SECRET] = SecretOutcome.ENDED
    hidden = [
        f"https://example.com/?token={SECRET}",
        "https://example.com/?token=" + SECRET.replace("_", "%5F"),
        "https://example.com/\x1b[31m",
        "https://example.com/" + "x" * 1_000,
    ]
    with caplog.at_level(logging.INFO, "latchkey.receiver"):
        async with scanner(service) as http:
            report = [match(SECRET, url=url) for url in (*hidden, "https://example.com/a.py")]
            await send(http, report)
    assert "found at https://example.com/a.py" in caplog.text
    assert "5 matches, 5 ended" in caplog.text
    assert caplog.text.count("(not shown") == len(hidden)
    assert "A" * 20 not in caplog.text
    assert "\x1b" not in caplog.text


async def test_log_has_no_imported_secret(caplog: pytest.LogCaptureFixture) -> None:
    """An imported secret, which can have any form, is not logged either."""
    caplog.set_level(logging.INFO, "latchkey.receiver")
    secret = "sk-live/0123456789+abc"
    places = [f"https://host.example/{secret}", f"https://host.example/?k={quote(secret, safe='')}"]
    async with scanner(Service(**{secret: SecretOutcome.ENDED})) as http:
        await send(http, [match(secret, url=place, source=secret) for place in places])
    assert "leaked secret revoked" in caplog.text
    assert secret not in unquote(caplog.text)


async def test_crash_is_hidden(caplog: pytest.LogCaptureFixture) -> None:
    """An unexpected error is logged by its type, without text or traceback."""
    service = Service()
    service.error = cast("Any", RuntimeError(SECRET))
    async with scanner(service) as http:
        answer = await send(http, [match(SECRET)])
    assert answer.status_code == 500
    assert SECRET not in answer.text + caplog.text


async def test_health() -> None:
    """The health check fails while there is no key."""
    now = [0.0]
    endpoint = Endpoint(document(test=KEY))
    keys = endpoint.keys({}, now)
    async with scanner(Service(), keys=keys) as http:
        assert (await http.get("/healthz")).status_code == 503
        await keys.start()
        assert (await http.get("/healthz")).text == "ok\n"
    await keys.close()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b'{"public_keys": []}',
        b'{"public_keys": [{"key_identifier": "a", "key": "b"}]}',
        b'{"public_keys": {"a": "b"}}',
        document(a=ed25519.Ed25519PrivateKey.generate()),
        document(a=ec.generate_private_key(ec.SECP384R1())),
        document(**{f"k{number}": KEY for number in range(public_keys.KEYS_MAX + 1)}),
    ],
    ids=[
        "empty",
        "array",
        "object",
        "no key",
        "no PEM",
        "no array",
        "Ed25519",
        "P-384",
        "too many",
    ],
)
def test_documents_without_usable_keys(text: bytes) -> None:
    """Only ECDSA keys with P-256 count, and without one the document is refused."""
    with pytest.raises(KeysError):
        parse(text)


def test_other_types_of_keys_are_ignored() -> None:
    """A document may have keys of other types beside those that count."""
    text = document(a=KEY, b=ed25519.Ed25519PrivateKey.generate())
    assert parse(text).keys() == {"a"}
    assert is_signed(parse(text)["a"], signature(b"x"), b"x")


def test_settings(tmp_path: Path) -> None:
    """The receiver needs keys, from a URL that nobody can tamper with or from a file."""
    path = tmp_path / "keys.json"
    path.write_bytes(document(test=KEY))
    rest = {"listen": "127.0.0.1:0", "target": "127.0.0.1:1", "action": Action.MARK}
    fixed = make(**rest, keys_url=None, keys_file=path).fixed_keys  # type: ignore[arg-type]
    assert fixed.keys() == {"test"}
    for url, file, words in (
        (None, None, "no keys"),
        ("http://example.com/keys", None, "https"),
        ("https://user@example.com/", None, "https"),
        ("file:///etc/keys", None, "https"),
        (None, tmp_path / "missing", "No such file"),
        (None, tmp_path, "directory"),
    ):
        with pytest.raises(SettingsError, match=words):
            make(**rest, keys_url=url, keys_file=file)  # type: ignore[arg-type]
    assert make(**rest, keys_url="http://127.0.0.1:1/", keys_file=None)  # type: ignore[arg-type]
    with pytest.raises(KeysError):
        read(tmp_path / "missing")
