"""Where output goes: standard output for results, standard error for everything else.

It owns streams and consoles. Data is never taken for markup here.
"""

import io
import json
import os
import sys
from typing import Any, Final, NoReturn, TextIO

from rich.console import Console

from latchkey_cli.failures import ClosedPipe, Exit, Failure

__all__ = [
    "confirmed",
    "console",
    "is_terminal",
    "prepare",
    "report",
    "silence",
    "to_json",
    "write",
]

# Wider than any row: what is piped is never wrapped, so that grep finds whole rows.
_PIPED_WIDTH: Final = 10_000


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        # rich would end the process with code 1.
        raise ClosedPipe


def console(stream: TextIO) -> Console:
    """Return a console on `stream` that takes strings as they are. Heeds NO_COLOR."""
    return _Console(
        file=stream,
        markup=False,
        emoji=False,
        highlight=False,
        width=None if is_terminal(stream) else _PIPED_WIDTH,
    )


def is_terminal(stream: TextIO | None) -> bool:
    """Tell whether a person looks at, or types into, `stream`."""
    return stream is not None and not stream.closed and stream.isatty()


def write(stream: TextIO, text: str) -> None:
    """Write and flush `text`. Raises ClosedPipe, and OSError such as a full disk."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        raise ClosedPipe from None


def confirmed(question: str) -> bool:
    """Ask a question on standard error and return whether the answer is yes.

    End of input means no. Raises KeyboardInterrupt.
    """
    write(sys.stderr, question)
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        write(sys.stderr, "\n")
    return answer.strip().lower() in ("y", "yes")


def to_json(document: Any, *, indent: int | None = 2) -> str:
    """Return `document` as JSON in ASCII, which no terminal obeys and no locale breaks."""
    return json.dumps(document, indent=indent, ensure_ascii=True, sort_keys=False)


def report(failure: Failure, *, as_json: bool) -> None:
    """Tell a failure on standard error: one line, or with `as_json` one object."""
    line = failure.line()
    if as_json:
        line = to_json({"error": failure.document()}, indent=None)
    write(sys.stderr, line + "\n")


def prepare() -> None:
    """Make the standard streams fit for use. Raises Failure when standard output is closed."""
    closed_output = sys.stdout is None
    for descriptor, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        if stream is None:
            # Or the first connection gets the number, and whoever writes to it speaks to the
            # service. The lowest free number is the one that is missing.
            os.open(os.devnull, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    if closed_output:
        sys.stdout = sys.stderr
        raise Failure(
            "standard output is closed",
            "give it somewhere to go, such as /dev/null",
            Exit.USAGE,
            code="USAGE",
        )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the locale lacks must not end the tool.
            stream.reconfigure(errors="backslashreplace")


def silence() -> None:
    """Let nothing complain about a closed pipe at exit, when Python flushes what is left."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
