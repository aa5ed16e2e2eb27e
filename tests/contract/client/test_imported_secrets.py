"""The client library and imported secrets, against a real server."""

import hashlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import latchkey
import pytest
from latchkey import ImportedToken, ImportOutcome, Scope, Verdict

from tests.helpers.servers import make_settings, serving
from tests.helpers.waiting import WAIT_SECONDS, eventually


@pytest.fixture
async def accepting(database_url: str, pepper_file: Path) -> AsyncIterator[str]:
    """Address of a server that accepts imported secrets."""
    settings = make_settings(database_url, pepper_file, "native")
    async with serving(settings.model_copy(update={"imported_prefixes": "acme_live_"})) as address:
        yield address


def key() -> str:
    return "acme_live_" + secrets.token_urlsafe(24)


def row(secret: str, name: str, scope: Scope = Scope.READ) -> ImportedToken:
    digest = hashlib.sha256(secret.encode()).digest()
    return ImportedToken(account_id="acme", name=name, scope=scope, secret_sha256=digest)


async def test_imported_secret_is_answered_from_the_cache_until_it_is_deleted(
    accepting: str,
) -> None:
    """A verifier asks about an imported secret before its first grant, keeps the answer, and
    refuses it everywhere once Delete has returned. It refuses strings without the prefix by itself
    once it knows the prefixes."""
    secret, other = key(), "other_" + secrets.token_urlsafe(24)
    async with latchkey.Client(accepting) as client:
        (result,) = await client.import_tokens([row(secret, "ci")])
        assert result.outcome is ImportOutcome.IMPORTED
        async with latchkey.Verifier(accepting, timeout_seconds=WAIT_SECONDS) as verifier:
            assert verifier.verify_nowait(secret) is None
            assert verifier.verify_nowait(other) is None
            assert (await verifier.verify(other)).verdict is Verdict.MALFORMED

            async def cached() -> bool:
                assert (await verifier.verify(secret, Scope.READ)).verdict is Verdict.VALID
                return verifier.verify_nowait(secret, Scope.READ) is not None

            await eventually(cached, "an answer from the cache")
            answer = verifier.verify_nowait(secret, Scope.WRITE)
            assert answer is not None
            assert answer.verdict is Verdict.INSUFFICIENT_SCOPE
            answer = verifier.verify_nowait(other)
            assert answer is not None
            assert answer.verdict is Verdict.MALFORMED
            assert verifier.verify_nowait(key()) is None
            await client.delete("acme", result.token_id)
            assert verifier.verify_nowait(secret, Scope.READ) is None
            assert (await verifier.verify(secret, Scope.READ)).verdict is Verdict.DELETED


async def test_uses_of_imported_secrets_are_counted(accepting: str) -> None:
    """Uses on the server and from the cache are counted. No part of the secret but its last four
    characters, and a prefix as ours, is stored."""
    secret = key()
    async with latchkey.Client(accepting) as client:
        hinted = replace(row(secret, "ci"), hint=f"acme_…{secret[-4:]}")
        (result,) = await client.import_tokens([hinted])
        assert (await client.verify(secret)).allowed

        async def shown() -> bool:
            token = await client.get("acme", result.token_id)
            return token.last_used_time is not None and (
                token.secrets[0].last_used_time == token.last_used_time
            )

        await eventually(shown, "the use to be written")
