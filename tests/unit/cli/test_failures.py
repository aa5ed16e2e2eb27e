import ast
import inspect
from pathlib import Path

import latchkey
import latchkey_cli
import pytest
from latchkey import errors
from latchkey_cli.failures import Exit, Failure, worst
from latchkey_cli.main import EPILOG
from latchkey_cli.session import Doing, Session, _longest

SECRET = "lk" + "_0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abcdefghijklmno" + "0jDM4R"

EXIT_CODES = {
    latchkey.AccessError: 7,
    latchkey.AlreadyExists: 4,
    latchkey.DeadlineExceeded: 6,
    latchkey.FailedPrecondition: 1,
    latchkey.InternalError: 1,
    latchkey.InvalidArgument: 2,
    latchkey.LatchkeyError: 1,
    latchkey.NotFound: 3,
    latchkey.PermissionDenied: 7,
    latchkey.ResourceExhausted: 6,
    latchkey.Unauthenticated: 7,
    latchkey.Unavailable: 6,
    latchkey.UnexpectedStatus: 1,
}


def failure_of(error: latchkey.LatchkeyError, doing: Doing) -> Failure:
    async def call() -> None:
        raise error

    with Session("127.0.0.1:1", None) as session, pytest.raises(Failure) as raised:
        session.run(call(), doing)
    return raised.value


def test_every_error_of_the_library_has_an_exit_code() -> None:
    """Every error of the client library maps to its documented exit code."""
    known = {
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, latchkey.LatchkeyError)
    }
    assert known == set(EXIT_CODES)
    for kind, exit_code in EXIT_CODES.items():
        failure = failure_of(kind("It failed."), Doing("get token 'x'"))
        assert failure.exit_code == exit_code, kind
        assert failure.line().startswith("latchkey: cannot get token 'x': ")
        assert "; " in failure.line()
        assert "\n" not in failure.line()


def test_lost_answers_say_what_may_have_happened() -> None:
    """After a deletion without an answer, the error says that it may have taken effect."""
    doing = Doing("delete token 'x'", "the token may be deleted")
    for error in (latchkey.Unavailable("Gone."), latchkey.DeadlineExceeded("Late.")):
        assert "the token may be deleted" in failure_of(error, doing).line()


@pytest.mark.parametrize("reason", [None, "CONNECTION_CLOSED"])
@pytest.mark.parametrize("unsent", [True, False])
def test_unsent_calls_are_known_to_change_nothing(reason: str | None, unsent: bool) -> None:
    """If the library knows that no attempt was sent, the error says that nothing was changed."""
    error = latchkey.Unavailable("Create failed: x (UNAVAILABLE).", reason=reason)
    error.unsent = unsent
    failure = failure_of(error, Doing("create", "the token may exist"))
    certain, doubt = ", then try again: nothing was changed", "; the token may exist"
    assert failure.to_do.endswith(certain if unsent else doubt)


@pytest.mark.parametrize(
    ("reason", "what", "to_do", "exit_code"),
    [
        ("TOO_MANY_SECRETS", "more than 5 secrets", "latchkey retire-secrets", 1),
        ("FLEET_UPGRADING", "earlier release", "when all servers are upgraded", 6),
        ("TOKEN_SEAL_INVALID", "changed in the database", "create another", 1),
        ("SOMETHING_NEW", "It failed", "operator", 1),
    ],
)
def test_changes_that_the_state_does_not_allow(
    reason: str, what: str, to_do: str, exit_code: int
) -> None:
    """The error says in plain words why the change is not possible now, and what to do."""
    error = latchkey.FailedPrecondition("It failed.", reason=reason)
    failure = failure_of(error, Doing("rotate token 'x'"))
    assert failure.exit_code == exit_code
    assert what in failure.what
    assert to_do in failure.to_do


def test_an_unconfirmed_change_is_reported_as_stored() -> None:
    """If the deadline was too short for the wait, the error says that the change is stored."""
    error = latchkey.Unavailable("Late.", reason="CHANGE_NOT_CONFIRMED")
    doing = Doing("update", "the change may be stored", unconfirmed="the change is stored")
    failure = failure_of(error, doing)
    assert failure.exit_code == 6
    assert "the change is stored" in failure.what


@pytest.mark.parametrize(
    ("kind", "reason", "said", "to_do"),
    [
        (
            latchkey.PermissionDenied,
            "METHOD_DENIED",
            "the role manager includes",
            "give this caller that role",
        ),
        (
            latchkey.PermissionDenied,
            "ACCOUNT_DENIED",
            "the role manager",
            "'accounts' in the policy",
        ),
        (latchkey.Unauthenticated, "IDENTITY_CONFLICT", "the role", "only a certificate or only a"),
        (latchkey.PermissionDenied, "OTHER", "permission denied (OTHER)", "grant access"),
        (latchkey.Unauthenticated, "CREDENTIAL_UNKNOWN", "does not know", "identify yourself"),
    ],
)
def test_refused_callers_get_specific_advice(
    kind: type[latchkey.LatchkeyError], reason: str, said: str, to_do: str
) -> None:
    """A refusal says in the service's words what is missing, and what to do about exactly that."""
    text = "Get failed: The policy allows what the role manager includes (X_Y, request 1). Advice."
    failure = failure_of(kind(text, reason=reason), Doing("get token 'x'"))
    assert said in failure.what
    assert reason in failure.what
    assert to_do in failure.to_do
    assert "Advice" not in failure.line()


def test_errors_carry_the_request_and_every_violation() -> None:
    """The error lists each invalid field and the request id."""
    error = latchkey.InvalidArgument("No.", request_id="17")
    error.field_violations = (
        latchkey.FieldViolation("name", "is required"),
        latchkey.FieldViolation("ttl", "must be greater than zero"),
    )
    failure = failure_of(error, Doing("create token ''"))
    assert "name: is required; ttl: must be greater than zero (request 17);" in failure.line()
    assert [violation["field"] for violation in failure.document()["field_violations"]] == [
        "name",
        "ttl",
    ]


def test_failures_carry_no_secret_and_no_control_character() -> None:
    """An error never prints a secret or a control character, whatever the service answers."""
    error = latchkey.InternalError(f"Oops \x1b[2J {SECRET}", request_id="1\x1b")
    failure = failure_of(error, Doing(f"verify {SECRET}", f"do {SECRET}"))
    text = failure.line() + repr(failure.document())
    assert SECRET not in text
    assert "\x1b" not in failure.line()


def test_worst_code_is_the_most_severe() -> None:
    """An unconfirmed deletion outweighs an unknown token."""
    assert worst([]) is Exit.OK
    assert worst([Exit.OK, Exit.NOT_FOUND]) is Exit.NOT_FOUND
    assert worst([Exit.UNAVAILABLE, Exit.NOT_FOUND, Exit.OK]) is Exit.UNAVAILABLE
    for code in Exit:
        assert worst([Exit.OK, code]) is code


def test_every_exit_code_is_in_the_help() -> None:
    """`latchkey --help` describes exactly the exit codes of the tool."""
    words = [line.split()[0] for line in EPILOG.splitlines()[1:]]
    described = [word for word in words if word.isdigit()]
    assert described == [str(int(code)) for code in Exit]


def test_the_tool_imports_no_service() -> None:
    """No module imports the service, which is optional, or the client library's internals."""
    for path in Path(latchkey_cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] != "latchkey_service", path
                assert not name.startswith(("latchkey.", "latchkey_proto")), path


@pytest.mark.parametrize(
    ("seconds", "longest"),
    [("7776000", "90d"), ("5400", "90m"), ("7200", "2h"), ("61", "61s"), ("", "90d"), ("x", "90d")],
)
def test_refused_lifetime_suggests_the_longest(seconds: str, longest: str) -> None:
    """The longest lifetime that a refusal states is suggested as a value of --expires."""
    error = latchkey.InvalidArgument("too long")
    error.metadata = {"max_ttl_seconds": seconds}
    assert _longest(error) == longest


def test_ctrl_c_says_what_may_have_happened() -> None:
    """Ctrl-C during a call is a failure with its own exit code."""

    async def call() -> None:
        raise KeyboardInterrupt

    with Session("127.0.0.1:1", None) as session, pytest.raises(Failure) as raised:
        session.run(call(), Doing("list the tokens"))
    assert (raised.value.exit_code, raised.value.code) == (Exit.INTERRUPTED, "INTERRUPTED")
    assert "interrupted while trying to list the tokens; nothing was changed" in str(raised.value)
