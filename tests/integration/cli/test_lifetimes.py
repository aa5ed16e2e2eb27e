"""The command line where the service limits how long tokens live."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.helpers.servers import make_settings, serving
from tests.helpers.tool import Run


@pytest.fixture
async def limited(database_url: str, pepper_file: Path) -> AsyncIterator[str]:
    """Address of a server that allows 90 days."""
    settings = make_settings(database_url, pepper_file, "native")
    async with serving(settings.model_copy(update={"max_ttl": "90d"})) as address:
        yield address


async def test_refusal_names_the_limit(run: Run, limited: str) -> None:
    """A token that would live too long is refused with the limit in words, and in JSON with a
    reason. One within the limit is created."""
    create = ("create", "ci", "--scope", "read")
    refused = await run(*create, target=limited)
    assert refused.code == 2
    assert re.sub(r" \(request [\w-]+\)", "", refused.err) == (
        "latchkey: cannot create token 'ci': expire_time: is required, because this service limits "
        "how long tokens live: at most 90 days from now; give --expires, such as --expires 90d\n"
    )
    late = await run(*create, "--expires", "91d", "--json", target=limited)
    assert (late.code, late.error["reason"]) == (2, "EXPIRY_TOO_LATE")
    assert "at most 90 days from now" in late.error["field_violations"][0]["description"]
    made = await run(*create, "--expires", "90d", "--json", target=limited)
    assert made.code == 0, made.err
    never = await run("update", made.json["token"]["id"], "--expires", "never", target=limited)
    assert never.code == 2
    assert "at most 90 days" in never.err
