"""Fixtures of the console's tests: a browser, the console, a relay, and the real service."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.console import browsing, tools
from tests.console.processes import Console, console, run, sql
from tests.console.relay import Relay
from tests.helpers.servers import clone_template
from tests.helpers.service_process import service

if TYPE_CHECKING:
    from latchkey_proto.v1.token_service_pb2_grpc import TokenServiceStub

_numbers = itertools.count(1)
DAY_SECONDS = 86_400


@dataclass
class World:
    """The setting of one browser test: its own account and the service behind the console."""

    url: str
    account: str
    relay: Relay
    stub: TokenServiceStub
    database_url: str
    process: Console

    def create(self, name: str, **fields: Any) -> Any:
        """Create a token as another program would. `days_old` and `expires_days` change its age."""
        days_old = fields.pop("days_old", None)
        expires_days = fields.pop("expires_days", None)
        request: dict[str, Any] = {
            "account_id": self.account,
            "name": name,
            "scope": pb.SCOPE_READ,
        } | fields
        if expires_days is not None and expires_days > 0:
            request["ttl"] = {"seconds": int(expires_days * DAY_SECONDS)}
        created = self.stub.Create(pb.CreateRequest(**request), timeout=10)
        if days_old is not None:
            age = timedelta(days=days_old)
            self.sql(
                "UPDATE token SET create_time = now() - $2::interval WHERE id = $1",
                *(created.token.id, age),
            )
            self.sql(
                "UPDATE secret SET create_time = now() - $2::interval WHERE token_id = $1",
                *(created.token.id, age),
            )
        if expires_days is not None and expires_days <= 0:
            # No call creates an expired token. Only lists may show this one: its row is not sealed.
            self.sql(
                "UPDATE token SET expire_time = now() + $2::interval WHERE id = $1",
                *(created.token.id, timedelta(days=expires_days)),
            )
        return created

    def used(self, created: Any, caller: str, count: int, age: timedelta) -> None:
        """Record uses of a token by a caller, the last of them this long ago."""
        last = datetime.now(UTC) - age
        token = created.token
        self.sql(
            "INSERT INTO token_usage (token_id, hint, caller, first_time, last_time)"
            " VALUES ($1, $2, $3, $4, $4)",
            *(token.id, token.hint, caller, last),
        )
        self.sql(
            "INSERT INTO token_usage_day (token_id, caller, day, count) VALUES ($1, $2, $3, $4)",
            *(token.id, caller, last.date(), count),
        )

    def tokens(self) -> dict[str, Any]:
        """Return the service's tokens of the account, by name."""
        request = pb.ListRequest(account_id=self.account, page_size=500)
        return {token.name: token for token in self.stub.List(request, timeout=10).tokens}

    def delete(self, token_id: str) -> None:
        """Delete a token without the console."""
        self.stub.Delete(pb.DeleteRequest(account_id=self.account, id=token_id), timeout=20)

    def verdict(self, secret: str) -> str:
        """Verify a secret and return the verdict."""
        answer = self.stub.Verify(pb.VerifyRequest(secret=secret), timeout=10)
        return pb.Verdict.Name(answer.verdict)

    def sql(self, statement: str, *values: Any) -> None:
        """Change the database."""
        sql(self.database_url, statement, *values)


@pytest.fixture(scope="session")
async def page_database(postgres_url: str, template_url: str) -> str:
    """A database that all console tests share; each test uses its own accounts."""
    return await clone_template(postgres_url, "console")


@pytest.fixture(scope="session")
def backend(page_database: str, pepper_file: Path, scratch: Path) -> Iterator[tuple[Relay, Any]]:
    """The real service as a process behind a relay, and a stub that bypasses the relay."""
    with (
        service(
            scratch / "page-service",
            database_url=page_database,
            pepper_file=pepper_file,
            data_dir=scratch / "page-data",
            listen="127.0.0.1:0",
            log_format="json",
        ) as running,
        grpc.insecure_channel(address := run(running.welcome())) as channel,
    ):
        relay = Relay(address)
        try:
            yield relay, pb_grpc.TokenServiceStub(channel)
        finally:
            relay.close()


@pytest.fixture(scope="session")
def page(backend: tuple[Relay, Any], scratch: Path) -> Iterator[tuple[Console, str]]:
    """The console as a process. The browser's own headers play the sign-in proxy."""
    arguments = ("--account-header", "X-Forwarded-User", "--trusted-proxy", "127.0.0.1")
    target = backend[0].address
    with console(scratch / "page", *arguments, "--target", target) as running:
        yield running


@pytest.fixture
def world(
    page: tuple[Console, str], backend: tuple[Relay, Any], page_database: str
) -> Iterator[World]:
    """An account that no other test uses, with a healthy service."""
    relay, stub = backend
    account = f"account-{next(_numbers)}"
    yield World(page[1], account, relay, stub, page_database, page[0])
    relay.well()


@pytest.fixture(scope="session")
def one_browser(pytestconfig: pytest.Config) -> Iterator[browsing.Browser]:
    """The browser that all tests use in turn."""
    with browsing.browser(saves_screens=pytestconfig.getoption("screens")) as running:
        yield running


@pytest.fixture
def browser(
    one_browser: browsing.Browser, world: World, request: pytest.FixtureRequest
) -> Iterator[browsing.Browser]:
    """The browser on the console's page, signed in as the test's account.

    The test fails if the browser logs any error, except for responses with the statuses that the
    test's marker `answers` lists, because browsers log these as errors.
    """
    one_browser.reset(world.url, world.account)
    yield one_browser
    marker = request.node.get_closest_marker("answers")
    expected = tuple(f"status of {status} " for status in (marker.args if marker else ()))
    complaints = one_browser.console_errors()
    unexpected = [c for c in complaints if not any(status in c for status in expected)]
    assert unexpected == []


@pytest.fixture(scope="session")
def axe() -> str:
    """The axe-core script."""
    return (tools.npm_packages() / "axe-core/axe.min.js").read_text("utf-8")


@pytest.fixture(params=["script", "no script"])
def script(request: pytest.FixtureRequest, browser: browsing.Browser) -> bool:
    """Run the test with JavaScript and again without it."""
    on = request.param == "script"
    browser.scripts(on=on)
    return on
