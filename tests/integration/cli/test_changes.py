"""The commands that change tokens, as processes against a running server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from google.protobuf.duration_pb2 import Duration
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.helpers.waiting import eventually

if TYPE_CHECKING:
    from latchkey_proto.v1.token_service_pb2_grpc import TokenServiceAsyncStub

    from tests.helpers.tool import Result, Run

Create = Callable[..., Awaitable[pb.CreateResponse]]


async def verdict(stub: TokenServiceAsyncStub, secret: str) -> str:
    answer = await stub.Verify(pb.VerifyRequest(secret=secret), timeout=10)
    return pb.Verdict.Name(answer.verdict).removeprefix("VERDICT_")


async def verified(run: Run, address: str, secret: str, *arguments: str) -> str:
    """Verify with the command line, which takes the address and permissions too."""
    answer = await run("verify", "--json", *arguments, target=address, stdin=secret)
    assert answer.code == (0 if answer.json["verdict"] == "VERDICT_VALID" else 5)
    return str(answer.json["verdict"].removeprefix("VERDICT_"))


async def test_create_and_update_restrict_a_token(
    run: Run, address: str, stub: TokenServiceAsyncStub
) -> None:
    """Networks, permissions and the rest can be given to a new token and changed later. What takes
    something away has a receipt, and what widens has none."""
    created = await run(
        *("create", "ci", "--scope", "write", "--description", "why", "--json"),
        *("--network", "192.0.2.1", "--network", "2001:db8::/32"),
        *("--permission", "orders:read", "--permission", "users:*"),
        target=address,
    )
    assert created.code == 0, created.err
    token, secret = created.json["token"], created.json["secret"]
    assert created.json["receipt"] is None
    assert token["description"] == "why"
    assert set(token["allowed_networks"]) == {"192.0.2.1/32", "2001:db8::/32"}
    assert set(token["permissions"]) == {"orders:read", "users:*"}
    here = ("--client-address", "2001:db8::7")
    assert await verified(run, address, secret, *here, "--permission", "users:write") == "VALID"
    assert await verified(run, address, secret) == "ADDRESS_NOT_ALLOWED"

    narrowed = await run(
        *("update", token["id"], "--scope", "read", "--permission", "orders:read", "--json"),
        target=address,
    )
    assert narrowed.code == 0, narrowed.err
    assert narrowed.json["receipt"]["effective_time"] is not None
    assert narrowed.json["token"]["scope"] == "SCOPE_READ"
    lacking = (*here, "--permission", "users:write")
    assert await verified(run, address, secret, *lacking) == "INSUFFICIENT_PERMISSIONS"

    widened = await run(
        *("update", token["id"], "--any-network", "--no-permissions", "--no-labels"),
        *("--name", "new name", "--description", "", "--expires", "never"),
        target=address,
    )
    assert widened.code == 0, widened.err
    assert "new name" in widened.out
    assert await verdict(stub, secret) == "VALID"
    renamed = await run("update", token["id"], "--expires", "30d", "--json", target=address)
    assert renamed.json["token"]["name"] == "new name"
    assert renamed.json["token"]["permissions"] == []
    assert renamed.json["token"]["expire_time"] > renamed.json["token"]["create_time"]


async def test_rate_limits(run: Run, address: str, stub: TokenServiceAsyncStub) -> None:
    """A limit can be given to a new token, is shown, and can be changed and removed."""
    created = await run(
        *("create", "ci", "--scope", "read", "--rate", "100/minute", "--burst", "1", "--json"),
        target=address,
    )
    assert created.code == 0, created.err
    token, secret = created.json["token"], created.json["secret"]
    assert token["rate_limit"] == {"count": 100, "period": "60.000000s", "burst": 1}
    tighter = await run("update", token["id"], "--rate", "1/hour", "--json", target=address)
    assert tighter.json["receipt"]["effective_time"] is not None
    assert await verdict(stub, secret) == "VALID"
    refused = await run("verify", target=address, stdin=secret)
    assert refused.code == 5
    assert "RATE_LIMITED: the token is used too often; try again in" in refused.out
    assert "1/hour" in refused.out
    free = await run("update", token["id"], "--no-rate", target=address)
    assert free.code == 0, free.err
    assert "Rate limit" not in free.out


async def test_a_change_that_is_not_possible(run: Run, address: str, create: Create) -> None:
    """A taken name exits with 4, an unknown token with 3, and invalid values with 2."""
    await create(name="taken")
    token = (await create(name="mine")).token
    taken, unknown, wrong = await asyncio.gather(
        run("update", token.id, "--name", "Taken", target=address),
        run("disable", "tok_nope", target=address),
        run("update", token.id, "--network", "10.0.0.1/8", "--permission", "x", target=address),
    )
    assert (taken.code, unknown.code, wrong.code) == (4, 3, 2)
    assert "already has that name" in taken.err
    assert "networks" in wrong.err
    assert "permissions" in wrong.err
    assert all(result.out == "" and result.err.count("\n") == 1 for result in (taken, wrong))


async def test_disable_and_enable(
    run: Run, address: str, create: Create, stub: TokenServiceAsyncStub
) -> None:
    """A disabled token is refused at once, shown as disabled, and accepted again later."""
    created = await create(name="ci")
    disabled = await run("disable", created.token.id, target=address)
    assert disabled.code == 0, disabled.err
    assert f"Disabled {created.token.id}" in disabled.out
    assert "in effect everywhere" in disabled.out
    assert await verdict(stub, created.secret) == "DISABLED"
    listed = await run("list", target=address)
    assert "read disabled" in " ".join(listed.out.split())
    enabled = await run("enable", created.token.id, "--json", target=address)
    assert enabled.json["token"]["disable_time"] is None
    assert enabled.json["receipt"] is None
    verify = partial(verdict, stub, created.secret)

    async def valid() -> bool:
        return await verify() == "VALID"

    await eventually(valid, "the token to be accepted again")


async def test_rotate_with_an_overlap(
    run: Run, address: str, create: Create, stub: TokenServiceAsyncStub
) -> None:
    """Standard output contains only the new secret. Both work until the older one is retired."""
    created = await create(name="ci")
    rotated = await run("rotate", created.token.id, "--grace", "7d", target=address)
    assert rotated.code == 0, rotated.err
    new = rotated.out.removesuffix("\n")
    assert len(new) == 60
    assert "shown only once" in rotated.err
    assert new not in rotated.err
    assert "works until" in rotated.err
    for secret in (created.secret, new):
        assert await verdict(stub, secret) == "VALID"
    got = await run("get", created.token.id, "--json", target=address)
    assert [secret["hint"][-4:] for secret in got.json["secrets"]] == [
        new[-4:],
        created.secret[-4:],
    ]

    retired = await run("retire-secrets", created.token.id, "--yes", "--json", target=address)
    assert retired.json["receipt"]["effective_time"] is not None
    assert await verdict(stub, created.secret) == "EXPIRED"
    assert await verdict(stub, new) == "VALID"


async def test_rotate_at_once(
    run: Run, address: str, create: Create, stub: TokenServiceAsyncStub
) -> None:
    """Without a grace, the older secret is dead when the command returns."""
    created = await create(name="ci")
    rotated = await run("rotate", created.token.id, "--yes", "--json", target=address)
    assert rotated.code == 0, rotated.err
    assert rotated.json["receipt"]["effective_time"] is not None
    assert await verdict(stub, created.secret) == "EXPIRED"
    assert await verdict(stub, rotated.json["secret"]) == "VALID"


async def test_rotate_until_the_first_use(
    run: Run, address: str, create: Create, stub: TokenServiceAsyncStub
) -> None:
    """The older secret works until the new one is first used."""
    created = await create(name="ci")
    rotated = await run("rotate", created.token.id, "--retire-on-first-use", target=address)
    assert rotated.code == 0, rotated.err
    assert await verdict(stub, created.secret) == "VALID"
    assert await verdict(stub, rotated.out.strip()) == "VALID"

    async def ended() -> bool:
        return await verdict(stub, created.secret) == "EXPIRED"

    await eventually(ended, "the older secret to end")


async def test_too_many_secrets(
    run: Run, address: str, create: Create, stub: TokenServiceAsyncStub
) -> None:
    """A sixth secret is refused in words that say what to do."""
    created = await create(name="ci")
    grace = Duration(seconds=3600)
    for _ in range(4):
        await stub.Rotate(pb.RotateRequest(account_id="acme", id=created.token.id, grace=grace))
    refused = await run("rotate", created.token.id, "--grace", "1h", target=address)
    assert refused.code == 1
    assert "more than 5 secrets" in refused.err
    assert "latchkey retire-secrets" in refused.err


async def test_usage_names_the_callers(
    run: Run, address: str, create: Create, stub: TokenServiceAsyncStub
) -> None:
    """After a verify, the command shows when the token was used, and how often."""
    created = await create(name="ci")
    unused = await run("usage", created.token.id, target=address)
    assert (unused.code, unused.out) == (0, "")
    assert "No use" in unused.err
    answer = await stub.Verify(pb.VerifyRequest(secret=created.secret))
    assert answer.verdict == pb.VERDICT_VALID

    async def recorded() -> Any:
        return (await run("usage", created.token.id, "--json", target=address)).json

    (caller,) = await eventually(recorded, "the use to be recorded")
    assert caller["caller"] == ""
    assert list(caller["days"].values()) == [1]
    shown: Result = await run("usage", created.token.id, "--days", target=address)
    (day,) = caller["days"]
    assert "no policy" in shown.out
    assert day in shown.out
    got = await run("get", created.token.id, target=address)
    assert "Last used" in got.out
