"""x-forwarded-client-cert, as Envoy writes it, and as somebody else might."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latchkey_service.access.forwarded import Forwarded, ForwardedError, parse


def element(by=(), uris=(), dns=(), certificate=True):
    return Forwarded(tuple(by), tuple(uris), tuple(dns), certificate)


@pytest.mark.parametrize(
    ("header", "elements"),
    [
        (
            'By=spiffe://a/envoy;Hash=468e;Subject="/C=US/L=San Francisco/CN=a";URI=spiffe://a/client',
            [element(["spiffe://a/envoy"], ["spiffe://a/client"])],
        ),
        (
            'Hash=ab;Subject="CN=\\"Quoted, Inc.\\";O=x";URI=;DNS=a.internal;DNS=www.a.internal',
            [element(dns=["a.internal", "www.a.internal"])],
        ),
        (
            "By=spiffe://a/x;URI=spiffe://a/y,By=spiffe://a/envoy;Hash=ab;URI=spiffe://a/z",
            [
                element(["spiffe://a/x"], ["spiffe://a/y"]),
                element(["spiffe://a/envoy"], ["spiffe://a/z"]),
            ],
        ),
        ("by=x; hash=y , BY=z;uri=u", [element(["x"]), element(["z"], ["u"])]),
        ('URI="spiffe://a/b,URI=spiffe://a/c"', [element(uris=["spiffe://a/b,URI=spiffe://a/c"])]),
        ("By=spiffe://a/envoy", [element(["spiffe://a/envoy"], certificate=False)]),
        ("Hash=a=b==", [element()]),
    ],
)
def test_what_is_read(header, elements):
    """Each element's names, quotes undone, the proxy's own last."""
    assert parse(header) == elements


@pytest.mark.parametrize(
    "header",
    [
        "",
        ",",
        "Hash",
        "Hash=a;",
        "Hash=a,",
        ";Hash=a",
        'Subject="a',
        'Subject="a\\"',
        'Subject="a"b;URI=spiffe://a/b',
        'URI=a"b"',
        "=a",
        "URI =a",
        "x" * 100_000,
    ],
)
def test_what_is_refused(header):
    """What is not of the form is refused as a whole, and not read as far as it goes."""
    with pytest.raises(ForwardedError):
        parse(header)


VALUES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=20)


def quoted(value):
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


@given(st.lists(st.lists(VALUES, min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_quoted_value_stays_one(elements):
    """Whatever is in a quoted value adds no other pair and no other element."""
    header = ",".join(";".join(f"DNS={quoted(v)}" for v in values) for values in elements)
    found = parse(header)
    assert [f.dns for f in found] == [tuple(v for v in values if v) for values in elements]


@given(st.text(max_size=100))
def test_any_text_is_read_or_refused(text):
    """Nothing else comes of a header, whatever it is."""
    with contextlib.suppress(ForwardedError):
        assert parse(text)
