"""Output: results go to standard output, everything else to standard error.

This module owns streams and consoles. It never interprets data as markup.
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
    "require_terminal",
    "silence",
    "to_json",
    "write",
    "write_bytes",
]

# Wider than any row: piped output never wraps, so grep finds whole rows.
_PIPED_WIDTH: Final = 10_000


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        # rich would exit with code 1.
        raise ClosedPipe


def console(stream: TextIO) -> Console:
    """Return a console on `stream` that prints strings literally. It honours NO_COLOR."""
    return _Console(
        file=stream,
        markup=False,
        emoji=False,
        highlight=False,
        width=None if is_terminal(stream) else _PIPED_WIDTH,
    )


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether `stream` is open and connected to a terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def write(stream: TextIO, text: str) -> None:
    """Write and flush `text`. Raises ClosedPipe, or OSError if for example the disk is full."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        raise ClosedPipe from None


def write_bytes(stream: TextIO, content: bytes) -> None:
    """Write and flush `content` unchanged. Raises as `write` does."""
    try:
        stream.flush()
        stream.buffer.write(content)
        stream.buffer.flush()
    except BrokenPipeError:
        raise ClosedPipe from None


def confirmed(question: str) -> bool:
    """Ask `question` on standard error and return whether the answer is yes.

    End of input means no. Raises KeyboardInterrupt on Ctrl-C.
    """
    write(sys.stderr, question)
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        write(sys.stderr, "\n")
    return answer.strip().lower() in ("y", "yes")


def require_terminal(to_do: str) -> None:
    """Raise Failure unless a question can be asked. `to_do` names the option to pass instead."""
    if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
        raise Failure("no terminal to ask for confirmation", to_do, Exit.USAGE, code="USAGE")


def to_json(document: Any, *, indent: int | None = 2) -> str:
    """Return `document` as ASCII JSON: free of terminal escapes, safe in every locale."""
    return json.dumps(document, indent=indent, ensure_ascii=True, sort_keys=False)


def report(failure: Failure, *, as_json: bool) -> None:
    """Print a failure to standard error: one line of text, or one object with `as_json`."""
    line = failure.line()
    if as_json:
        line = to_json({"error": failure.document()}, indent=None)
    write(sys.stderr, line + "\n")


def prepare() -> None:
    """Make the standard streams usable. Raises Failure if standard output is closed."""
    closed_output = sys.stdout is None
    for descriptor, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        if stream is None:
            # Otherwise the first connection would get this descriptor, and code that writes to the
            # stream would write to the service. os.open takes the lowest free descriptor, which is
            # the missing one.
            os.open(os.devnull, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    if closed_output:
        sys.stdout = sys.stderr
        raise Failure(
            "standard output is closed",
            "redirect it, for example to /dev/null",
            Exit.USAGE,
            code="USAGE",
        )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character outside the locale's encoding must not abort the tool.
            stream.reconfigure(errors="backslashreplace")


def silence() -> None:
    """Keep Python from reporting a closed pipe when it flushes the streams at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
