"""The trace of the current call: its spans, and the id that log lines and audit entries carry.

Every room may open spans here. Owns neither the decision which calls are recorded
(`rpc/traced_calls.py`) nor the export (`process/trace_export.py`), and imports no library for
traces: with traces off, each function only reads a context variable.

An ended span takes no children, so a task that outlives its call is not recorded.
"""

import contextlib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Final, NamedTuple, Protocol

__all__ = [
    "TRACEPARENT",
    "Attributes",
    "Parent",
    "Span",
    "current",
    "failed",
    "joined",
    "leave",
    "of_task",
    "parent_in",
    "span",
    "trace_id_of",
    "within",
]

TRACEPARENT: Final = "traceparent"
# W3C Trace Context §3.2: 00-<trace id>-<parent id>-<flags>. A later version may append fields.
_FORM: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_LENGTH_MAX: Final = 256
_SAMPLED: Final = 1
# The links that the specification lets a span have by default.
_LINKS_MAX: Final = 128

Attributes = Mapping[str, str | int | bool]


class Parent(NamedTuple):
    """The span of the caller, as it reports it."""

    trace_id: str
    span_id: str
    sampled: bool


class Span(Protocol):
    """A span that is recorded."""

    code: str
    """The status with which its call failed, or ""."""

    @property
    def trace_id(self) -> str:
        """The id of its trace: 32 hexadecimal digits."""
        ...

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        ...

    def child(self, name: str, attributes: Attributes, links: Sequence["Span"] = ()) -> "Span":
        """Begin a span inside this one. It links to `links`, the other spans that it works for."""
        ...

    def link(self, other: "Span") -> None:
        """Refer to another span that did a part of this one's work."""
        ...

    def set(self, attributes: Attributes) -> None:
        """Add attributes."""
        ...

    def end(self, error: str = "") -> None:
        """End it. `error` is a reason, never the text of an exception."""
        ...


_current: ContextVar[Span | None] = ContextVar("latchkey_span", default=None)


# Neither runs Python code, because every cold Verify calls both.
of_task: Final = _current.get
"""Returns the span of the call that started the current task, even if it has ended, or None."""
leave: Final = functools.partial(_current.set, None)
"""Detaches the current task from the call that started it: the task also works for others."""


def current() -> Span | None:
    """Return the span in which the current task works, if the call is recorded."""
    found = of_task()
    return None if found is None or found.ended else found


@contextlib.contextmanager
def within(span: Span) -> Iterator[None]:
    """Make `span` the current one. It does not end with the block."""
    token = _current.set(span)
    try:
        yield
    finally:
        _current.reset(token)


@contextlib.contextmanager
def span(name: str, attributes: Attributes) -> Iterator[Span | None]:
    """Record the block as a span inside the current one. Yields None if nothing is recorded."""
    outer = current()
    if outer is None:
        yield None
        return
    inner = outer.child(name, attributes)
    error = ""
    try:
        with within(inner):
            yield inner
    except BaseException as raised:
        error = _reason(raised)
        if sqlstate := getattr(raised, "sqlstate", None):
            inner.set({"db.response.status_code": sqlstate})
        raise
    finally:
        inner.end(error)


@contextlib.contextmanager
def joined(spans: Iterable[Span]) -> Iterator[None]:
    """Record what happens in the block for several calls, as a part of the first one's trace.

    The spans of the others link to it.
    """
    found = [each for each in spans if not each.ended]
    if not found:
        yield
        return
    with within(_Joint(found)):
        yield


def failed(code: str, reason: str, request_id: str) -> None:
    """Report the status of a call that failed, for its span."""
    if (found := current()) is not None:
        found.code = code
        found.set({"latchkey.reason": reason, "latchkey.request_id": request_id})


def parent_in(metadata: Any) -> Parent | None:
    """Return the caller's span that the pairs in `metadata` name, or None.

    Ignores a malformed or repeated `traceparent`, as the standard requires.
    """
    found = None
    for key, value in metadata or ():
        if key == TRACEPARENT:
            if found is not None:
                return None
            found = value
    if not isinstance(found, str) or len(found) > _LENGTH_MAX:
        return None
    match = _FORM.fullmatch(found)
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more is not None):
        return None
    if not (int(trace_id, 16) and int(span_id, 16)):
        return None
    return Parent(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))


def trace_id_of(metadata: Any) -> str:
    """Return the id of the current trace, else the one in a call's metadata, else ""."""
    if (found := current()) is not None:
        return found.trace_id
    parent = parent_in(metadata)
    return "" if parent is None else parent.trace_id


class _Joint:
    """Several spans as one. Its children belong to the first, and are linked with the others."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._first, self._others = spans[0], spans[1 : _LINKS_MAX + 1]
        self.trace_id = self._first.trace_id
        self.ended = False
        self.code = ""

    def child(self, name: str, attributes: Attributes, links: Sequence[Span] = ()) -> Span:
        inner = self._first.child(name, attributes, (*links, *self._others))
        for other in self._others:
            if not other.ended:
                other.link(inner)
        return inner

    def link(self, other: Span) -> None:
        self._first.link(other)

    def set(self, attributes: Attributes) -> None:
        self._first.set(attributes)

    def end(self, error: str = "") -> None:
        """Leave the spans to the calls that they belong to."""


def _reason(error: BaseException) -> str:
    """Return the reason of our own errors, else the type. The text may contain anything."""
    return getattr(error, "reason", "") or type(error).__qualname__
