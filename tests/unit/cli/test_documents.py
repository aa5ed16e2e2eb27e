import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone
from io import StringIO
from typing import Any

import pytest
from latchkey import (
    CallerUsage,
    Change,
    CreatedToken,
    Notifications,
    Receipt,
    RotatedToken,
    Scope,
    Secret,
    SecretOutcome,
    Status,
    Token,
    TokenSecret,
    Verdict,
    Verification,
    VerifierStatus,
)
from latchkey_cli import documents, tables
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import token_service_pb2 as pb
from rich.console import Console

TIME = datetime(2026, 3, 1, 12, tzinfo=UTC)
TOKEN = Token(
    id="tok_1",
    account_id="acme",
    name="[bold]deploy[/bold] \x1b]0;x\x07",
    scope=Scope.READ,
    create_time=TIME.astimezone(timezone(timedelta(hours=2))),
    hint="lk_…abcd",
    labels={"b": "2", "a": "1"},
)


LATER = datetime(2100, 1, 1, tzinfo=UTC)
RICH = replace(
    TOKEN,
    name="deploy",
    description="For the nightly export.\nAsk \x1b[2JAnn.",
    disable_time=TIME,
    last_used_time=TIME,
    last_used_by="shop",
    allowed_networks=("192.0.2.0/24", "2001:db8::/32"),
    permissions=("orders:*", "users:read"),
    secrets=(
        TokenSecret(hint="lk_…new1", create_time=TIME, retire_on_first_use=True),
        TokenSecret(hint="lk_…old1", create_time=TIME, expire_time=LATER, last_used_time=TIME),
    ),
)


def fields(message: str, module: Any = pb) -> set[str]:
    return set(module.DESCRIPTOR.message_types_by_name[message].fields_by_name)


def receipt(
    acknowledged: int, outwaited: int, clients_acknowledged: int = 0, clients_outwaited: int = 0
) -> Receipt:
    return Receipt(
        commit_time=TIME,
        effective_time=TIME + timedelta(milliseconds=12.4),
        revision=7,
        verifiers_acknowledged=acknowledged,
        verifiers_outwaited=outwaited,
        mark=2**64 - 1,
        clients_acknowledged=clients_acknowledged,
        clients_outwaited=clients_outwaited,
    )


STATUS = Status(
    head_revision=12,
    verifiers=(
        VerifierStatus(
            id="v1",
            host="web-\x1b[2J",
            process_id=77,
            version="1.2",
            start_time=TIME,
            acknowledged_revision=10,
            lag=2,
            lease_duration=timedelta(seconds=3),
            lease_remaining=timedelta(0),
            clients=4,
            notifications=Notifications.SILENT,
            answering=False,
            pepper_ids=("0f1e2d3c4b5a", "a1b2c3d4e5f6"),
            database_host="db-1:5432",
            timeline="00000002",
        ),
    ),
    warnings=("Pepper 0f1e2d3c4b5a is missing on web-\x1b[2J.",),
    head_mark=2**63 + 1,
)
WAITING = replace(
    STATUS,
    verifiers=(replace(STATUS.verifiers[0], waiting_for=("ci at ipv4:10.0.0.1:5\x1b[2J", "b")),),
)


WARNING = "Warning: Pepper 0f1e2d3c4b5a is missing on web-\\x1b[2J."
SERVER = "Database db-1:5432 (timeline 00000002)"
COLUMNS = "PID Version Acknowledged Lag Lease left Clients"


@pytest.mark.parametrize(
    ("width", "table"),
    [
        (
            120,
            [
                f"Host {COLUMNS} Notifications Pepper",
                "web-\\x1b[2J 77 1.2 10 2 ended 4 silent 0f1e2d3c4b5a",
            ],
        ),
        (
            80,
            [
                "Notifications",
                f"Host {COLUMNS} Pepper",
                "web-\\x1b[2J 77 1.2 10 2 ended 4 silent",
                "0f1e2d3c4b5a",
            ],
        ),
    ],
)
def test_status_is_a_table_of_verifiers(width: int, table: list[str]) -> None:
    """People see which verifier is behind or has lost its lease, the pepper that each creates
    tokens with, and every warning. No terminal obeys a host's name."""
    assert status_lines(STATUS, width) == ["Head revision 12, 1 verifier", *table, SERVER, WARNING]


UNREPORTED = replace(STATUS.verifiers[0], database_host="", timeline="", system_identifier="")
ON_FIRST = replace(
    STATUS.verifiers[0],
    database_host="db1.example:5432",
    system_identifier="7713595303237486605",
    timeline="00000001",
)
ON_SECOND = replace(
    ON_FIRST, process_id=78, database_host="db2\x1b[2J", timeline="00000002", system_identifier=""
)
FIRST = "Database db1.example:5432 (timeline 00000001, system identifier 7713595303237486605)"


@pytest.mark.parametrize(
    ("verifiers", "lines"),
    [
        ([UNREPORTED], []),
        ([ON_FIRST, ON_FIRST], [FIRST]),
        (
            [replace(ON_FIRST, database_host="", system_identifier="")],
            ["Database timeline 00000001"],
        ),
        ([replace(ON_SECOND, timeline="")], ["Database db2\\x1b[2J"]),
        (
            [ON_FIRST, ON_SECOND, replace(ON_FIRST, process_id=79), UNREPORTED],
            [
                f"{FIRST}: web-\\x1b[2J PID 77, web-\\x1b[2J PID 79",
                "Database db2\\x1b[2J (timeline 00000002): web-\\x1b[2J PID 78",
                "Database unknown: web-\\x1b[2J PID 77",
            ],
        ),
    ],
    ids=["not reported", "one", "embedded", "host alone", "several"],
)
def test_status_names_the_database_server(
    verifiers: list[VerifierStatus], lines: list[str]
) -> None:
    """Below the table, a line names the database server of the leases, with its timeline.
    If processes report different servers, there is a line for each, with its processes. No terminal
    obeys what they report."""
    status = replace(STATUS, verifiers=tuple(verifiers), warnings=())
    shown = [line for line in status_lines(status, 160) if line.startswith("Database")]
    assert shown == lines
    wrapped = status_lines(status, 80)
    assert max(map(len, wrapped)) <= 80
    assert all(line in " ".join(wrapped) for line in lines)


def test_status_shows_warnings_without_verifiers() -> None:
    """A warning is shown even if no verifier is registered, and the schema if it is reported."""
    status = replace(STATUS, verifiers=(), schema_version=15)
    assert status_lines(status, 90) == ["Head revision 12, 0 verifiers, schema 0015", WARNING]


def test_status_names_the_clients_that_deletions_wait_for() -> None:
    """A line for each process that waits for clients names them. Their names are escaped."""
    waits = "Deletions wait for clients of web-\\x1b[2J (PID 77): ci at ipv4:10.0.0.1:5\\x1b[2J, b"
    assert waits in status_lines(WAITING, 120)
    assert not any("wait" in line for line in status_lines(STATUS, 120))


def test_status_of_a_release_without_peppers() -> None:
    """The pepper of a release that does not report it is shown as unknown."""
    status = replace(STATUS, verifiers=(replace(STATUS.verifiers[0], pepper_ids=()),))
    assert "unknown" in status_lines(status, 90)


def status_lines(status: Status, width: int) -> list[str]:
    console = Console(file=StringIO(), width=width)
    tables.print_status(console, status)
    assert isinstance(console.file, StringIO)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_documents_have_the_fields_of_the_proto() -> None:
    """JSON contains every field of the message under the proto's name; absent fields are null."""
    token = documents.document(TOKEN)
    # The client library does not have these yet.
    assert set(token) == fields("Token")
    assert set(documents.document(receipt(0, 0))) == fields("Receipt")
    status = documents.document(STATUS)
    assert set(status) == fields("GetStatusResponse", status_pb)
    assert set(status["verifiers"][0]) == fields("VerifierStatus", status_pb)
    assert status["verifiers"][0]["lease_remaining"] == "0.000000s"
    assert documents.document(WAITING)["verifiers"][0]["waiting_for"][1] == "b"
    # Strings, because a reader with floating-point numbers would round them.
    assert status["head_mark"] == "9223372036854775809"
    assert documents.document(receipt(0, 0))["mark"] == "18446744073709551615"
    (server,) = documents.document(replace(STATUS, verifiers=(ON_FIRST,)))["verifiers"]
    assert (server["database_host"], server["timeline"]) == ("db1.example:5432", "00000001")
    assert server["system_identifier"] == "7713595303237486605"
    assert set(documents.document(Verification(verdict=Verdict.UNKNOWN))) == fields(
        "VerifyResponse"
    )
    created = documents.with_secret(CreatedToken(token=TOKEN, secret=Secret("s")))
    assert set(created) == fields("CreateResponse")
    assert created["secret"] == "s"
    rotated = documents.with_secret(
        RotatedToken(token=TOKEN, secret=Secret("s"), receipt=receipt(1, 0))
    )
    assert set(rotated) == fields("RotateResponse")
    assert rotated["receipt"]["revision"] == 7
    assert set(documents.document(Change(token=TOKEN))) == fields("UpdateResponse")
    (secret, _) = documents.document(RICH)["secrets"]
    assert set(secret) == fields("TokenSecret")
    for outcome in SecretOutcome:
        assert documents.document(outcome) in set(pb.SecretOutcome.keys())
    assert token["scope"] in set(pb.Scope.keys())
    assert token["create_time"] == "2026-03-01T12:00:00.000000Z"
    assert token["expire_time"] is None
    for verdict in Verdict:
        document = documents.document(Verification(verdict=verdict, token=TOKEN))
        assert document["verdict"] in set(pb.Verdict.keys())


def shown(width: int, *tokens: Token) -> str:
    console = Console(file=StringIO(), width=width, markup=False, highlight=False, emoji=False)
    table = tables.TokenTable(console)
    for token in tokens:
        table.print_page([token])
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_names_are_shown_as_data() -> None:
    """Markup and escape sequences in a name are printed and have no effect."""
    for width in (80, 120):
        text = shown(width, TOKEN)
        assert r"[bold]deploy[/bold] \x1b]0;x\x07" in text
        assert "\x1b" not in text


def test_pages_make_one_table_that_fits() -> None:
    """All pages share one header, no line is too long, and every id stays whole."""
    tokens = [
        Token(
            id=f"tok_01m85p4026a9mpn8gsxx9fkn{number:02}",
            account_id="acme",
            name="n" * length,
            scope=Scope.WRITE,
            create_time=TIME,
            expire_time=datetime(2100, 1, 1, tzinfo=UTC),
            hint="lk_…abcd",
        )
        for number, length in enumerate((1, 64, 5))
    ]
    for width in (80, 120):
        text = shown(width, *tokens)
        assert max(map(len, text.splitlines())) <= width
        assert text.count("Created") == 1
        assert all(token.id in text for token in tokens)


def test_receipts_count_who_confirmed() -> None:
    """A receipt says since when the token has been dead, how many servers and clients confirmed
    it, and how many were outwaited.
    """
    for proof, words in (
        (receipt(0, 0), "dead everywhere since"),
        (replace(receipt(0, 0), effective_time=None), "not yet confirmed everywhere"),
        (
            receipt(1, 0, 3),
            "dead everywhere after 12 ms: 1 server and 3 clients confirmed, 0 outwaited",
        ),
        (
            receipt(3, 1, 1, 2),
            "12 ms: 3 servers and 1 client confirmed, 3 outwaited (1 server and 2 clients)",
        ),
    ):
        console = Console(file=StringIO(), width=120)
        tables.print_receipt(console, "tok_1", proof)
        assert isinstance(console.file, StringIO)
        assert words in console.file.getvalue()


def test_receipt_of_invalidate_all() -> None:
    """The receipt says when every cache was empty, and how many confirmed and were outwaited, in
    at most 80 columns.
    """
    console = Console(file=StringIO(), width=80)
    tables.print_invalidation(console, receipt(3, 0, 40, 1))
    assert isinstance(console.file, StringIO)
    shown = " ".join(console.file.getvalue().split())
    assert shown.startswith("Cleared the cache of every verifier Committed 2026-03-01 ")
    assert "Revision 7 Confirmed after 12 ms: 3 servers and 40 clients confirmed, 1" in shown
    assert shown.endswith("1 outwaited (0 servers and 1 client)")
    assert max(map(len, console.file.getvalue().splitlines())) <= 80


def printed(show: Callable[[Console], None], width: int = 90) -> str:
    console = Console(file=StringIO(), width=width, markup=False, highlight=False, emoji=False)
    show(console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_a_token_shows_all_that_restricts_it() -> None:
    """Description, permissions, networks, secrets, state and last use are shown. No terminal obeys
    the description, and its lines stay lines."""
    text = printed(lambda console: tables.describe_token(console, RICH))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "Description For the nightly export." in lines
    assert r"Ask \x1b[2JAnn." in lines
    assert "Permissions orders:*" in lines
    assert "users:read" in lines
    assert "Networks 192.0.2.0/24" in lines
    assert any(line.startswith("Disabled 2026-03-01") for line in lines)
    assert any(line.startswith("Last used 2026") and line.endswith(" by shop)") for line in lines)
    flat = " ".join(lines)
    assert "Secrets lk_…new1, created 2026-03-01" in flat
    assert "its first use ends the older ones" in flat
    assert "lk_…old1" in flat
    assert "works until 2100-01-01" in flat
    assert re.search(r"\), last used \d+ \w+ ago", flat)
    ended = replace(RICH.secrets[1], expire_time=TIME)
    text = printed(
        lambda console: tables.describe_token(
            console, replace(RICH, secrets=(RICH.secrets[0], ended))
        )
    )
    assert ", ended 2026-03-01" in " ".join(text.split())


def test_a_list_shows_state_and_last_use() -> None:
    """At any width, a list shows which tokens are disabled and when each was last used."""
    for width in (80, 150):
        text = shown(width, RICH, replace(TOKEN, name="x"))
        assert max(map(len, text.splitlines())) <= width
        assert "disabled" in text
        assert "Last used" in text
        assert ("2026-03-01" if width == 80 else "ago") in text
        assert " -" in text


def test_a_change_says_whether_it_took_something_away() -> None:
    """With a receipt, it says since when the change is in effect. Without one, verifiers follow."""
    narrowed = printed(
        lambda console: tables.print_change(
            console, "Updated", Change(token=TOKEN, receipt=receipt(1, 0)), no_wait=False
        )
    )
    assert "Updated tok_1" in narrowed
    assert "in effect everywhere after 12 ms" in narrowed
    widened = printed(
        lambda console: tables.print_change(console, "Enabled", Change(token=TOKEN), no_wait=False)
    )
    assert "Took nothing away" in widened
    many = printed(lambda console: tables.print_deletions(console, 2, receipt(1, 0)))
    assert "Deleted 2 tokens" in many
    assert "dead everywhere after 12 ms" in many


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (Verdict.DISABLED, "the token is disabled"),
        (Verdict.ADDRESS_NOT_ALLOWED, "--client-address"),
        (Verdict.INSUFFICIENT_PERMISSIONS, r"permissions a:b, \x1b"),
        (Verdict.UNSPECIFIED, "does not know the verdict"),
    ],
)
def test_verdicts_are_explained(verdict: Verdict, words: str) -> None:
    """Each verdict comes with its meaning, and with the permissions that were required."""
    answer = Verification(verdict=verdict, token=TOKEN)
    text = printed(
        lambda console: tables.print_verification(console, answer, None, ["a:b", "\x1b"]), 120
    )
    assert words in text


def test_usage_has_the_fields_of_the_proto() -> None:
    """The uses of a caller have the proto's names. Days are an object from date to count."""
    usage = CallerUsage(
        caller="shop",
        first_used_time=TIME,
        last_used_time=TIME,
        days={date(2026, 3, 2): 5, date(2026, 3, 1): 7},
    )
    document = documents.document(usage)
    assert set(document) == fields("CallerUsage")
    assert list(document["days"].items()) == [("2026-03-02", 5), ("2026-03-01", 7)]
