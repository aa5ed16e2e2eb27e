"""The streams of the command line: what is written where, even if a stream is closed or full."""

import errno
import io
import json
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from latchkey_cli import main as tool
from latchkey_cli import output
from latchkey_cli.failures import ClosedPipe, Exit, Failure
from latchkey_cli.proto import proto


class Stream(io.TextIOWrapper):
    """A stream of bytes that may be a terminal."""

    def __init__(self, content: bytes = b"", *, terminal: bool = False) -> None:
        self.bytes = io.BytesIO(content)
        self._terminal = terminal
        super().__init__(self.bytes, encoding="utf-8")

    def isatty(self) -> bool:
        return self._terminal


class Broken(Stream):
    """A pipe that nobody reads any more."""

    def flush(self) -> NoReturn:
        raise BrokenPipeError

    def close(self) -> None:
        """Python closes a stream that it discards, and would flush it first."""


def test_contract_is_written_as_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`latchkey proto` writes the contract as a descriptor set, unchanged."""
    stream = Stream()
    monkeypatch.setattr(sys, "stdout", stream)
    proto()
    names = [file.name for file in FileDescriptorSet.FromString(stream.bytes.getvalue()).file]
    assert "latchkey/v1/token_service.proto" in names


def test_contract_is_not_written_to_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """`latchkey proto` refuses to print binary data on a terminal."""
    stream = Stream(terminal=True)
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(Failure, match="binary data on a terminal") as refused:
        proto()
    assert refused.value.exit_code == Exit.USAGE
    assert stream.bytes.getvalue() == b""


@pytest.mark.parametrize(
    "write",
    [lambda stream: output.write(stream, "x"), lambda stream: output.write_bytes(stream, b"x")],
)
def test_closed_pipe_is_reported_as_such(write: Callable[[Stream], None]) -> None:
    """A reader that has left ends the command, and is not taken for a full disk."""
    with pytest.raises(ClosedPipe):
        write(Broken())


@pytest.mark.parametrize(
    ("answer", "confirms", "shown"),
    [("yes\n", True, "? "), (" Y \n", True, "? "), ("\n", False, "? "), ("", False, "? \n")],
)
def test_only_yes_confirms(
    monkeypatch: pytest.MonkeyPatch, answer: str, confirms: bool, shown: str
) -> None:
    """Only a yes confirms. The end of the input means no, and ends the line of the question."""
    asked = Stream()
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    monkeypatch.setattr(sys, "stderr", asked)
    assert output.confirmed("? ") is confirms
    assert asked.bytes.getvalue().decode() == shown


def test_closed_streams_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection gets the descriptor of a closed stream, and a closed output is refused."""
    opened: list[int] = []
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    monkeypatch.setattr(os, "open", lambda _path, flags: opened.append(flags))
    with pytest.raises(Failure, match="standard output is closed"):
        output.prepare()
    assert opened == [os.O_RDONLY, os.O_WRONLY, os.O_WRONLY]
    sys.stderr.write("not lost in a connection")
    sys.stderr.close()


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize(
    ("error", "code", "reported"),
    [
        (OSError(errno.ENOSPC, "No space left"), Exit.UNEXPECTED, "cannot write the output: No sp"),
        (Failure("a", "b", Exit.DENIED, code="DENIED"), Exit.DENIED, "a"),
        (KeyboardInterrupt(), Exit.INTERRUPTED, ""),
        (ClosedPipe(), Exit.CLOSED_PIPE, ""),
    ],
)
def test_each_end_has_its_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    as_json: bool,
    error: BaseException,
    code: Exit,
    reported: str,
) -> None:
    """A full disk, a failure, Ctrl-C and a closed pipe end the tool with their exit codes, and
    with a report in the form that was asked for."""

    def end(_arguments: list[str]) -> NoReturn:
        raise error

    monkeypatch.setattr(tool, "_run", end)
    monkeypatch.setattr(sys, "argv", ["latchkey", "list", *(["--json"] if as_json else [])])
    assert tool.main() == code
    printed = capsys.readouterr().err
    if not reported:
        assert printed.strip() == ""
    elif as_json:
        assert json.loads(printed)["error"]["message"].startswith(reported)
    else:
        assert printed.startswith(f"latchkey: {reported}")
