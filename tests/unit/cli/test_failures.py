import ast
import inspect
from pathlib import Path

import latchkey
import latchkey_cli
import pytest
from latchkey import errors
from latchkey_cli.failures import Exit, Failure, worst
from latchkey_cli.main import EPILOG
from latchkey_cli.session import Doing, Session

SECRET = "lk" + "_0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abcdefghijklmno" + "0jDM4R"

REFUSED = "UNKNOWN: ipv4:127.0.0.1:1: connect: Connection refused (111)"

EXIT_CODES = {
    latchkey.AccessError: 7,
    latchkey.AlreadyExists: 4,
    latchkey.DeadlineExceeded: 6,
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


@pytest.mark.parametrize(
    ("text", "reason", "known"),
    [
        # The messages of gRPC's two load balancers and its resolver.
        (f"failed to connect to all addresses; last error: {REFUSED}", None, True),
        (f"connections to all backends failing; last error: {REFUSED}", None, True),
        ("DNS resolution failed for nowhere.invalid:1: Domain name not found", None, True),
        (
            "connections to all backends failing; last error: UNKNOWN: Socket closed",
            "CONNECTION_CLOSED",
            True,
        ),
        ("Socket closed", None, False),
        ("recvmsg:Connection reset by peer", None, False),
        ("upstream: failed to connect to all addresses", None, False),
        ("some future message", None, False),
    ],
)
def test_unsent_calls_are_known_to_change_nothing(
    text: str, reason: str | None, known: bool
) -> None:
    """It is certain that nothing was changed only if gRPC reports that there was no connection and
    the call had one attempt: after several, the error describes only the last."""
    error = latchkey.Unavailable(f"Create failed: {text} (UNAVAILABLE).", reason=reason)
    once = failure_of(error, Doing("create", "the token may exist", once=True))
    several = failure_of(error, Doing("create", "the token may exist"))
    certain, doubt = ", then try again: nothing was changed", "; the token may exist"
    assert once.to_do.endswith(certain if known else doubt)
    assert several.to_do.endswith(doubt)


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
    described = [line.split()[0] for line in EPILOG.splitlines()[1:]]
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
