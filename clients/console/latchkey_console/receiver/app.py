"""The endpoint: checks the signature of a report, revokes or marks its secrets, and answers.

The format is that of GitHub's secret scanning partner program: a POST with a JSON array of matches,
and an answer that labels each one. Reports may be repeated at any time: revoking and marking are
idempotent. No secret is logged; the answer repeats only what the request had.
"""

import contextlib
import json
import logging
import math
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

import latchkey
from latchkey import SecretOutcome
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from latchkey_console.connections import RequestLimit
from latchkey_console.receiver.keys import PublicKeys, Undecided, is_signed
from latchkey_console.receiver.settings import Action, ReceiverSettings

__all__ = ["BODY_BYTES_MAX", "HEALTH", "make_app"]

_log = logging.getLogger("latchkey.receiver")

HEALTH: Final = "/healthz"
# 4,000 matches with a secret, a type and a URL of 250 bytes each.
BODY_BYTES_MAX: Final = 2 * 1024 * 1024
MATCHES_MAX: Final = 10_000
# The service's limit of secrets in a call.
BATCH_MAX: Final = 1_000
# The service's limit of a call is 128 KiB. Each secret also adds a few bytes.
BATCH_BYTES_MAX: Final = 100_000
# No secret is longer. A longer text is not sent to the service.
_TOKEN_BYTES_MAX: Final = 256
_IDENTIFIER_LENGTH_MAX: Final = 200
# Texts of the report that are logged. Others can be of any length.
_LOGGED_LENGTH_MAX: Final = 300
# The first characters of a secret, as in the client library's pattern for redaction.
_SECRET_WITHIN: Final = re.compile(r"[A-Za-z]{2,10}_[0-9A-Za-z]{20,}")
_LABELS: Final = {
    SecretOutcome.ENDED: "true_positive",
    SecretOutcome.ENDED_BEFORE: "true_positive",
    SecretOutcome.REPORTED: "true_positive",
    SecretOutcome.UNKNOWN: "false_positive",
    SecretOutcome.MALFORMED: "false_positive",
}
_LEAKED: Final = (SecretOutcome.ENDED, SecretOutcome.REPORTED)


@dataclass(frozen=True, slots=True, repr=False)
class _Match:
    """A match in a report."""

    token: str
    type: str
    url: str
    source: str


def make_app(
    settings: ReceiverSettings,
    *,
    client: latchkey.Client | None = None,
    keys: PublicKeys | None = None,
    monotonic: Callable[[], float] = time.monotonic,
) -> ASGIApp:
    """Return the receiver as an ASGI application. Run its lifespan, which closes the client."""
    client = client or latchkey.Client(settings.target)
    keys = keys or PublicKeys(settings.fixed_keys, settings.keys_url, monotonic)
    receiver = _Receiver(client, keys, settings.action)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with client:
            # Before the first report, so that the health check succeeds at once.
            await keys.start()
            yield
            await keys.close()

    app = Starlette(
        routes=[
            Route("/", receiver.receive, methods=["POST"]),
            Route(HEALTH, receiver.health),
        ],
        lifespan=lifespan,
    )
    return RequestLimit(app, frozenset({HEALTH}), BODY_BYTES_MAX)


class _Receiver:
    """Handles the requests."""

    def __init__(self, client: latchkey.Client, keys: PublicKeys, action: Action) -> None:
        self._client = client
        self._keys = keys
        self._action = action

    async def health(self, _: Request) -> Response:
        """Report whether the receiver can check signatures. Says nothing about Latchkey."""
        if not self._keys.has_any():
            return PlainTextResponse("no keys\n", 503)
        return PlainTextResponse("ok\n")

    async def receive(self, request: Request) -> Response:
        """Act on a report, and label its matches."""
        try:
            return await self._receive(request)
        except Exception as error:  # noqa: BLE001 - the text may quote the request
            # Not by Starlette's own handler, after which uvicorn logs the traceback.
            _log.error("unexpected error: %s", type(error).__name__)
            return PlainTextResponse("Unexpected error. Send the report again.\n", 500)

    async def _receive(self, request: Request) -> Response:
        body = await _body(request)
        if body is None:
            return PlainTextResponse(f"The body has more than {BODY_BYTES_MAX} bytes.\n", 413)
        if (refusal := await self._refusal(request, body)) is not None:
            return refusal
        try:
            items = json.loads(body)
        except (ValueError, RecursionError):
            items = None
        if not isinstance(items, list) or len(items) > MATCHES_MAX:
            return PlainTextResponse(
                f"The body must be a JSON array of at most {MATCHES_MAX} matches.\n", 400
            )
        matches = [match for item in items if (match := _match(item)) is not None]
        try:
            outcomes = await self._act(matches)
        except latchkey.LatchkeyError as error:
            # Some batches may be done. The report may be sent again.
            _log.error("report not processed: %s (%s)", type(error).__name__, error.reason)
            return PlainTextResponse(
                "Latchkey did not answer. Send the report again.\n",
                503,
                headers={"retry-after": "10"},
            )
        self._log_outcomes(len(items), matches, outcomes)
        return JSONResponse(
            [
                # The hash would do too, but its encoding is not defined.
                {"token_raw": match.token, "token_type": match.type, "label": _LABELS[outcome]}
                for match, outcome in zip(matches, outcomes, strict=True)
                if outcome in _LABELS
            ]
        )

    async def _refusal(self, request: Request, body: bytes) -> Response | None:
        """Return the answer to a report without a valid signature, or None."""
        identifier = request.headers.get("github-public-key-identifier", "")
        signature = request.headers.get("github-public-key-signature", "")
        if not identifier or not signature or len(identifier) > _IDENTIFIER_LENGTH_MAX:
            return PlainTextResponse("The report is not signed.\n", 401)
        try:
            key = await self._keys.find(identifier)
        except Undecided as undecided:
            _log.warning("report not processed: cannot fetch key %s now", _loggable(identifier))
            return PlainTextResponse(
                "The key is unknown, and keys cannot be fetched now. Send the report again.\n",
                503,
                headers={"retry-after": str(math.ceil(undecided.seconds))},
            )
        if key is None or not is_signed(key, signature, body):
            why = "unknown key" if key is None else "wrong signature"
            _log.warning("report refused: %s, key %s", why, _loggable(identifier))
            return PlainTextResponse("The signature is not valid.\n", 401)
        return None

    async def _act(self, matches: Sequence[_Match]) -> list[SecretOutcome]:
        """Revoke or mark the secrets; return the outcome of each. Raises LatchkeyError."""
        outcomes: list[SecretOutcome] = []
        for batch in _batches(matches):
            if self._action is Action.REVOKE:
                outcomes += (await self._client.revoke_secrets(batch)).outcomes
            else:
                outcomes += await self._client.report_secrets(batch)
        return outcomes

    def _log_outcomes(
        self, number: int, matches: Sequence[_Match], outcomes: Sequence[SecretOutcome]
    ) -> None:
        counted = Counter(outcome.value for outcome in outcomes)
        _log.info(
            "report processed: %d matches, %s",
            number,
            ", ".join(f"{count} {name}" for name, count in sorted(counted.items())) or "none valid",
        )
        for match, outcome in zip(matches, outcomes, strict=True):
            if outcome in _LEAKED:
                _log.warning(
                    "leaked secret %s: type %s, source %s, found at %s",
                    "revoked" if outcome is SecretOutcome.ENDED else "marked",
                    _loggable(match.type, match.token),
                    _loggable(match.source, match.token),
                    _loggable(match.url, match.token),
                )


async def _body(request: Request) -> bytes | None:
    """Return the body, or None if it is too long."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > BODY_BYTES_MAX:
            return None
    return bytes(body)


def _match(item: Any) -> _Match | None:
    """Return the match in an element of the array, or None if it has no token."""
    if not isinstance(item, dict) or (token := _text(item.get("token"))) is None:
        return None
    return _Match(token, *(_text(item.get(name)) or "" for name in ("type", "url", "source")))


def _text(value: Any) -> str | None:
    """Return a text, or None for other values.

    None too for a text that UTF-8 cannot encode: JSON may contain lone surrogates.
    """
    if not isinstance(value, str):
        return None
    try:
        value.encode()
    except UnicodeEncodeError:
        return None
    return value


def _batches(matches: Sequence[_Match]) -> Iterator[list[str]]:
    """Yield the secrets in batches that the service accepts."""
    batch: list[str] = []
    size = 0
    for match in matches:
        token, token_bytes = match.token, len(match.token.encode())
        if token_bytes > _TOKEN_BYTES_MAX:
            # An empty text has the outcome MALFORMED, as any text that is too long has.
            token, token_bytes = "", 0
        size += token_bytes + 4
        if batch and (len(batch) == BATCH_MAX or size > BATCH_BYTES_MAX):
            yield batch
            batch, size = [], token_bytes + 4
        batch.append(token)
    if batch:
        yield batch


def _loggable(text: str, token: str = "") -> str:
    """Return a text of the report for the log: printable, short, and without a secret.

    `token` is the text that was reported. An imported secret has no form that shows what it is.
    """
    if len(text) > _LOGGED_LENGTH_MAX or not text.isprintable():
        return "(not shown)"
    # A URL may contain the secret, even percent-encoded.
    for form in (text, unquote(text)):
        if _SECRET_WITHIN.search(form) or (token and token in form):
            return "(not shown: contains a secret)"
    return text or "(none)"
