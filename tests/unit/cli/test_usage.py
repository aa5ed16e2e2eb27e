import inspect
import sys
from collections.abc import Callable

import pytest
from latchkey_cli.bulk import delete_all
from latchkey_cli.listing import list_tokens
from latchkey_cli.main import main
from latchkey_proto.v1.token_service_pb2 import TokenFilter

GARBAGE = "lk" + "_" + "x" * 57


@pytest.fixture(autouse=True)
def account(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the option that most commands need. No test here reaches a server."""
    monkeypatch.setenv("LATCHKEY_ACCOUNT", "acme")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("create x", "read, write"),
        ("create x --scope admin", "'admin' is not one of 'read', 'write'"),
        ("create x --scope read --expires soon", "30d"),
        ("create x --scope read --expires 0d", "longer than 0"),
        ("create x --scope read --label team", "KEY=VALUE"),
        ("create x --scope read --label a=1 --label a=2", "twice"),
        ("list --timeout nan", "more than 0"),
        ("list --timeout 0", "more than 0"),
        ("list --target=", "HOST:PORT"),
        ("list --limit 0", "--limit"),
        ("list --account", "--account"),
        ("get", "'ID'"),
        ("delete --yes true", "take no value"),
        ("delete --yes False x", "take no value"),
        ("update", "'ID'"),
        ("update x", "nothing to change"),
        ("update x --label a=1 --no-labels", "exclude each other"),
        ("update x --network 10.0.0.0/8 --any-network", "exclude each other"),
        ("update x --permission a:b --no-permissions", "exclude each other"),
        ("update x --rate 5/second --no-rate", "exclude each other"),
        ("update x --burst 5", "give --rate too"),
        ("update x --rate 100", "100/minute"),
        ("create x --scope read --rate 5/day", "100/minute"),
        ("create x --scope read --rate 5/hour,burst", "100/minute"),
        ("update x --scope admin", "'admin' is not one of 'read', 'write'"),
        ("update x --expires soon", "30d"),
        ("rotate x --grace soon", "90m"),
        ("rotate x --grace 999999999w", "90m"),
        ("delete-all --unused-since never --yes", "a duration"),
        ("delete-all --expires-before soon --yes", "a duration"),
        ("delete-all --label team --yes", "KEY=VALUE"),
        ("delete-all --state live --yes", "'live' is not one of"),
        ("delete-all --can-write maybe --yes", "'maybe' is not one of 'yes', 'no'"),
        ("lits", "'list'"),
        ("config --nonsense", "--nonsense"),
        ("list -account acme", "two; write --account"),
        ("create x --scope read -label=a=b", "two; write --label"),
        ("get -tok_x", "put '--' before an argument that begins with a dash"),
        ("list --tls-ca", "'--tls-ca' requires an argument"),
        ("list --target", "'--target' requires an argument"),
        ("list --target=127.0.0.1:1,127.0.0.1:2", "such as ipv4:10.0.0.1:50051"),
        ("policy check --role manager", "belong to 'policy new-caller'"),
    ],
)
def test_wrong_usage_prints_one_helpful_line(
    line: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A usage error exits with code 2 and one line on standard error."""
    monkeypatch.setattr(sys, "argv", ["latchkey", *line.split()])
    assert main() == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("latchkey: ")
    assert shown.err.count("\n") == 1
    assert words in shown.err
    assert "--help" in shown.err


@pytest.mark.parametrize(
    "line",
    [
        f"verify {GARBAGE}",
        f"verify --scope {GARBAGE}",
        f"create {GARBAGE} --scope read --json",
        f"create x --scope read --label secret={GARBAGE}",
        f"get x --account={GARBAGE}",
        f"delete x {GARBAGE} --yes",
        f"revoke {GARBAGE}",
        f"update x --name {GARBAGE}",
        GARBAGE,
    ],
)
def test_secrets_are_refused_in_any_argument(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An argument that contains a secret is refused and not printed."""
    monkeypatch.setattr(sys, "argv", ["latchkey", *line.split()])
    assert main() == 2
    shown = capsys.readouterr()
    assert GARBAGE not in shown.out + shown.err
    assert "looks like a secret" in shown.err


COMMANDS = (
    "create list get delete update disable enable rotate retire-secrets usage revoke delete-all "
    "verify status audit console receiver serve policy migrate doctor config"
)


@pytest.mark.parametrize("command", ["", *COMMANDS.split()])
def test_help_fits_80_columns_and_shows_plain_flags(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 80 columns, no help text is cut off, and no flag seems to take a value."""
    monkeypatch.setattr(sys, "argv", ["latchkey", *command.split(), "--help"])
    monkeypatch.setenv("COLUMNS", "80")
    assert main() == 0
    shown = capsys.readouterr().out
    assert "Show this message and exit." in shown
    assert "…" not in shown
    assert "bool" not in shown


@pytest.mark.parametrize(
    "line", ["rotate x", "rotate x --grace 0s", "retire-secrets x", "delete-all"]
)
def test_without_a_terminal_what_cannot_be_undone_needs_yes(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script must confirm explicitly that secrets or tokens may end at once."""
    monkeypatch.setattr(sys, "argv", ["latchkey", *line.split()])
    assert main() == 2
    shown = capsys.readouterr()
    assert "no terminal to ask for confirmation" in shown.err
    assert "--yes" in shown.err


def test_revoke_takes_no_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An argument may be a secret whose form is not recognised. It is refused and not printed."""
    monkeypatch.setattr(sys, "argv", ["latchkey", "revoke", "s3cr3t"])
    assert main() == 2
    shown = capsys.readouterr()
    assert "s3cr3t" not in shown.out + shown.err
    assert "latchkey revoke < FILE" in shown.err


@pytest.mark.parametrize("command", [list_tokens, delete_all])
def test_commands_have_every_filter(command: Callable[..., None]) -> None:
    """`list` and `delete-all` have an option for each filter of the contract. Single tokens have
    commands of their own."""
    fields = {each.name for each in TokenFilter.DESCRIPTOR.fields} - {"ids"}
    assert fields <= inspect.signature(command).parameters.keys()
