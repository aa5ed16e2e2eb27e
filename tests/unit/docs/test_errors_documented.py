"""The errors in the contract and in docs/errors.md are those of the service and client library."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import grpc
import pytest
from latchkey import _filters, _status
from latchkey.guards import _grpc as guard
from latchkey_service import errors
from latchkey_service.access.methods import METHODS
from latchkey_service.errors import LatchkeyError

from tests.helpers.repository import ROOT

DOCUMENT = (ROOT / "docs/errors.md").read_text("utf-8")
SERVICE, LIBRARY = re.split("^## Reasons.*$", DOCUMENT, flags=re.MULTILINE)[1:]
CLASSES: dict[str, type[LatchkeyError]] = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, LatchkeyError)
}


def table(text: str) -> list[tuple[str, str]]:
    """Return the code and reason of each row. A row without a code has that of the row before."""
    rows, code = [], ""
    for line in re.findall(r"^\| ?.*`.*\|$", text, re.MULTILINE):
        first, reason, when, to_do = (cell.strip() for cell in line.strip("|").split(" | "))
        if reason == "`ErrorInfo.reason`":
            continue
        assert when, line
        assert to_do, line
        code = first.strip("`") or code
        rows.append((code, reason.strip("`")))
    return rows


def by_class() -> Iterator[tuple[str, str]]:
    """Code and reason of the classes that define a reason or inherit one."""
    for error in CLASSES.values():
        if not issubclass(error, errors.Denied):
            yield error.code.name, error.reason


def where_made() -> Iterator[tuple[str, str]]:
    """Code and reason of the errors that receive one where they are raised."""
    for path in (ROOT / "service/latchkey_service").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            error = CLASSES.get(node.func.id)
            if error is None:
                continue
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            parameters = list(inspect.signature(error.__init__).parameters.values())[1:]
            for parameter, value in zip(parameters, node.args, strict=False):
                if parameter.kind is parameter.VAR_POSITIONAL:
                    break
                given[parameter.name] = value
            reason = given.get("reason")
            if reason is None:
                continue
            # Otherwise it could be any, and its absence from the document would go unnoticed.
            assert isinstance(reason, ast.Constant), (path, node.lineno)
            yield error.code.name, str(reason.value)


def test_reasons_of_the_service() -> None:
    """The table lists each reason of the service once, with its code, and no others."""
    rows = table(SERVICE)
    assert len(rows) == len(set(rows))
    # The reasons that a violation gives its error.
    violations = {("INVALID_ARGUMENT", reason) for reason in get_args(errors.ViolationReason)}
    assert set(rows) == {*by_class(), *where_made(), *violations}


def test_reasons_of_the_library() -> None:
    """The same holds for the client library and its guard."""
    given = {(code.name, reason) for code, _, reason in guard._REFUSALS.values()}
    given |= {(grpc.StatusCode.UNAVAILABLE.name, reason) for _, reason, _ in _status._NO_CONNECTION}
    given.add((grpc.StatusCode.FAILED_PRECONDITION.name, _filters.NOT_APPLIED))
    rows = table(LIBRARY)
    assert len(rows) == len(set(rows))
    assert set(rows) == given


@pytest.mark.parametrize("path", sorted(ROOT.glob("proto/latchkey/v1/*.proto")), ids=str)
def test_contract(path: Path) -> None:
    """Each service's comment says which errors all of its methods share, and where the reasons are
    listed."""
    comment = re.search(r"((?://.*\n)+)service (\w+) ", path.read_text("utf-8"))
    assert comment is not None
    methods = [name for name in METHODS if name.startswith(f"/latchkey.v1.{comment[2]}/")]
    assert methods
    for code in ("UNAUTHENTICATED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "INTERNAL"):
        assert code in comment[1]
    assert "docs/errors.md" in comment[1]


def test_each_error_has_a_status() -> None:
    """Every error of the service's tree has a gRPC code: only the base has that of a bug."""

    def tree(error: type[LatchkeyError]) -> set[type[LatchkeyError]]:
        return {error}.union(*map(tree, error.__subclasses__()))

    # Only subclasses of Denied are raised.
    without = {e for e in tree(LatchkeyError) if e.code is grpc.StatusCode.INTERNAL}
    assert without == {LatchkeyError, errors.Denied}
