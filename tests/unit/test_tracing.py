"""The caller's span in metadata, and spans inside the current one."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latchkey_service import tracing
from latchkey_service.tracing import Parent, parent_in

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def parsed(value: Any) -> Parent | None:
    return parent_in([("x", "y"), ("traceparent", value)])


@pytest.mark.parametrize(("flags", "sampled"), [("00", False), ("01", True), ("02", False)])
def test_a_callers_span(flags: str, sampled: bool) -> None:
    """The flag says whether the caller records it; other flags do not matter."""
    assert parsed(f"00-{TRACE}-{PARENT}-{flags}") == Parent(TRACE, PARENT, sampled)


def test_a_later_version_may_append_fields() -> None:
    """Only the fields of version 00 are read (W3C Trace Context §3.2.2)."""
    for more in ("", "-what-the-future-will-be-like"):
        assert parsed(f"cc-{TRACE}-{PARENT}-01{more}") == Parent(TRACE, PARENT, True)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "00",
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE}-{PARENT}-1",
        f"00-{TRACE}-{PARENT}-01-",
        f"00-{TRACE}-{PARENT}-01\n",
        f" 00-{TRACE}-{PARENT}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{PARENT[:-1]}\u0667-01",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"01-{TRACE}-{PARENT}-01-{'x' * 300}",
        f"00-{TRACE}-{PARENT}-01".encode(),
        None,
    ],
)
def test_a_malformed_traceparent_counts_as_none(value: Any) -> None:
    """A malformed header is ignored, because callers may send anything."""
    assert parsed(value) is None


def test_a_repeated_traceparent_counts_as_none() -> None:
    """A repeated header is ignored, because nobody can know which one is meant."""
    one = ("traceparent", f"00-{TRACE}-{PARENT}-01")
    assert parent_in([one, one]) is None
    assert parent_in(()) is parent_in(None) is None


@given(st.one_of(st.text(), st.binary(), st.text("0f-", min_size=54, max_size=58)))
def test_whatever_is_accepted_has_the_right_form(value: str | bytes) -> None:
    """An id that log lines and audit entries carry has 32 hexadecimal digits."""
    found = parsed(value)
    if found is not None:
        assert len(found.trace_id) == 32
        assert int(found.trace_id, 16)
        assert set(found.trace_id) <= set("0123456789abcdef")


class Span:
    """Keeps what is recorded."""

    def __init__(self, name: str = "call") -> None:
        self.name = name
        self.trace_id, self.code, self.ended, self.error = TRACE, "", False, ""
        self.attributes: dict[str, Any] = {}
        self.children: list[Span] = []
        self.links: list[Any] = []

    def child(self, name: str, attributes: Any, links: Any = ()) -> "Span":
        inner = Span(name)
        inner.attributes, inner.links = dict(attributes), list(links)
        self.children.append(inner)
        return inner

    def link(self, other: Any) -> None:
        self.links.append(other)

    def set(self, attributes: Any) -> None:
        self.attributes |= attributes

    def end(self, error: str = "") -> None:
        self.ended, self.error = True, error


def test_nothing_is_recorded_without_a_call() -> None:
    """A block outside of a recorded call has no span, and the id is that of the metadata."""
    with tracing.span("block", {}) as span:
        assert span is None
    with tracing.joined([]):
        assert tracing.current() is None
    assert tracing.trace_id_of([("traceparent", f"00-{TRACE}-{PARENT}-00")]) == TRACE
    assert tracing.trace_id_of(()) == ""


def test_an_error_gives_its_reason_or_its_type() -> None:
    """The span has no text of an error, because that may contain a secret."""
    call = Span()
    with tracing.within(call):
        with pytest.raises(KeyError), tracing.span("block", {}):
            raise KeyError("canary")
        assert tracing.trace_id_of(()) == TRACE
    assert tracing.current() is None
    (block,) = call.children
    assert (block.error, block.ended) == ("KeyError", True)
    assert "canary" not in str(vars(block))


def test_a_span_that_has_ended_takes_no_children() -> None:
    """A task that a call left behind may do other work."""
    call = Span()
    with tracing.within(call):
        call.end()
        with tracing.span("later", {}) as span:
            assert span is None
        with tracing.joined([call]):
            assert tracing.current() is None
    assert call.children == []


def test_a_joined_span_links_with_all_calls() -> None:
    """A joined span belongs to the first call that is recorded and has not ended."""
    ended, first, second = Span(), Span(), Span()
    ended.end()
    with tracing.joined([ended, first, second]), tracing.span("query", {"a": 1}):
        pass
    (query,) = first.children
    assert query.links == [second]
    assert second.links == [query]
    assert second.children == ended.children == []


def test_links_have_a_limit() -> None:
    """A batch of a thousand verifies does not make a span of a thousand links."""
    calls = [Span() for _ in range(1_000)]
    with tracing.joined(calls), tracing.span("query", {}):
        pass
    assert len(calls[0].children[0].links) == 128
