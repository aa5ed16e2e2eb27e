"""x-forwarded-client-cert: headers as Envoy writes them, and malformed or forged ones."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latchkey_service.access.forwarded import Forwarded, ForwardedError, parse


def expected(by=(), uris=(), dns=(), certificate=True, pem=b""):
    return Forwarded(tuple(by), tuple(uris), tuple(dns), pem, certificate)


@pytest.mark.parametrize(
    ("header", "found"),
    [
        # As Envoy 1.40 writes them, with all optional parts and with few.
        (
            (
                'By=spiffe://a/envoy;By=spiffe://a/two;Hash=4e;Cert="a%20b";Chain="c";Subject="a,b";'
                "URI=spiffe://a/client;DNS=a.internal;DNS=www.a.internal"
            ),
            expected(
                ["spiffe://a/envoy", "spiffe://a/two"],
                ["spiffe://a/client"],
                ["a.internal", "www.a.internal"],
                pem=b"a b",
            ),
        ),
        (
            'By=spiffe://a/envoy;Hash=468e;Subject="/C=US/L=San Francisco/CN=a";URI=spiffe://a/client',
            expected(["spiffe://a/envoy"], ["spiffe://a/client"]),
        ),
        (
            'Hash=ab;Subject="CN=\\"Quoted, Inc.\\";O=x";URI=;DNS=a.internal;DNS=www.a.internal',
            expected(dns=["a.internal", "www.a.internal"]),
        ),
        ("by=x;HASH=y;uri=u", expected(["x"], ["u"])),
        ('URI="spiffe://a/b,URI=spiffe://a/c"', expected(uris=["spiffe://a/b,URI=spiffe://a/c"])),
        ("By=spiffe://a/envoy", expected(["spiffe://a/envoy"], certificate=False)),
        ('By=x;Subject="";URI=', expected(["x"], certificate=False)),
    ],
)
def test_valid_headers(header, found):
    """The parser returns the names and the certificate, unquoted and percent-decoded."""
    assert parse(header) == found


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
        # Unquoted characters that need quotes.
        "Hash=a=b",
        "By=x;URI= y",
        "By=x;URI=y ",
        "By=x; URI=y",
        "By=x;URI=y\0",
        "By=x;URI=y\n",
        "By=x;URI=y\xa0",
        "By=x;DNS=\u212aelvin.internal",
        b"By=x;DNS=a.internal",
    ],
)
def test_malformed_headers_are_rejected(header):
    """A malformed header is rejected as a whole; its valid part is not used."""
    with pytest.raises(ForwardedError):
        parse(header)


@pytest.mark.parametrize(
    "header",
    [
        # Elements of two proxies; the second may be part of a URI, as Envoy writes it.
        "By=spiffe://a/x;URI=spiffe://a/y,By=spiffe://a/envoy;Hash=ab;URI=spiffe://a/z",
        "By=spiffe://a/envoy;URI=spiffe://a/evil,By=spiffe://a/envoy;URI=spiffe://a/admin",
        "By=spiffe://a/envoy,DNS=a",
        # Possible parts of a DNS name or URI.
        "By=spiffe://a/envoy;Hash=ab;URI=;DNS=x;URI=spiffe://a/admin",
        "By=spiffe://a/envoy;Hash=ab;URI=x;By=spiffe://a/other",
        "By=spiffe://a/envoy;Hash=ab;DNS=x;Cert=y",
        "By=spiffe://a/envoy;Hash=ab;DNS=x;Subject=y",
        "By=spiffe://a/envoy;Hash=ab;DNS=x;Chain=y",
        "By=spiffe://a/envoy;Hash=ab;DNS=x;Hash=y",
        "By=spiffe://a/envoy;Hash=ab;DNS=x;Other=y",
        "Other=y;By=spiffe://a/envoy;Hash=ab;DNS=x",
        # Names that begin or end with a semicolon.
        "By=spiffe://a/envoy;Hash=ab;URI=;URI=spiffe://a/admin",
        "By=spiffe://a/envoy;Hash=ab;URI=spiffe://a/b;DNS=;DNS=admin.internal",
        "By=spiffe://a/envoy;Hash=ab;DNS=admin.internal;DNS=",
        # A certificate has only one of each of these.
        "By=spiffe://a/envoy;Hash=ab;Hash=cd;URI=x",
        "By=spiffe://a/envoy;Cert=ab;Cert=cd;URI=x",
        "By=spiffe://a/envoy;Chain=ab;Chain=cd;URI=x",
        "By=spiffe://a/envoy;Subject=ab;Subject=cd;URI=x",
    ],
)
def test_ambiguous_headers_are_rejected(header):
    """Several elements, unknown keys, keys out of order, and repeated keys that must be unique are
    rejected, because a part of them may belong to a name."""
    with pytest.raises(ForwardedError):
        parse(header)


VALUES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=20)


def quoted(value):
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


@given(st.lists(VALUES.filter(bool), min_size=1, max_size=5))
def test_quoted_value_stays_one_value(values):
    """Whatever a quoted value contains, it never adds a pair or an element."""
    found = parse(";".join(f"DNS={quoted(value)}" for value in values))
    assert found == expected(dns=values, certificate=True)


@given(st.text(max_size=100))
def test_any_text(text):
    """Any header is parsed or raises ForwardedError, never another exception."""
    with contextlib.suppress(ForwardedError):
        parse(text)
