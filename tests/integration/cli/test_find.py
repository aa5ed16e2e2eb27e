"""`latchkey find`, as a process against a running server."""

import json
from collections.abc import Awaitable, Callable

from latchkey_proto.v1 import token_service_pb2 as pb

from tests.helpers.tool import Run

Create = Callable[..., Awaitable[pb.CreateResponse]]


async def test_tokens_of_all_accounts_are_found(run: Run, address: str, create: Create) -> None:
    """An id shows one token in full, and the end of a secret lists tokens, including deleted
    ones."""
    created = await create(account_id="globex", name="nightly export")
    token = created.token
    one = await run("find", token.id, "--target", address)
    assert one.code == 0, one.err
    assert "globex" in one.out
    assert "nightly export" in one.out
    deleted = await run("delete", token.id, "-a", "globex", "--yes", "--target", address)
    assert deleted.code == 0, deleted.err
    listed = await run("find", token.hint[-4:].lower(), "--target", address)
    assert listed.code == 0, listed.err
    assert token.id in listed.out
    assert "deleted" in listed.out
    again = await run("find", token.id, "--json", "--target", address)
    found = json.loads(again.out)
    assert found["tokens"][0]["token"]["account_id"] == "globex"
    assert found["tokens"][0]["delete_time"] is not None
    assert found["callers"] == []


async def test_nothing_found(run: Run, address: str) -> None:
    """If no token matches, the exit code is 3, even with --json. A bad hint is a usage error."""
    # The second one was copied in part.
    for token_id in ("tok_" + "0" * 26, "tok_01m8n3jb62"):
        none = await run("find", token_id, "--target", address)
        assert (none.code, none.out) == (3, "")
        assert "no token has this ID" in none.err
    as_json = await run("find", "~~~~", "--json", "--target", address)
    assert as_json.code == 3
    assert json.loads(as_json.out) == {"tokens": [], "callers": []}
    short = await run("find", "abc", "--target", address)
    assert short.code == 2
    assert "last 4 characters" in short.err
