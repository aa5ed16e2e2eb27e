"""x-forwarded-client-cert, as Envoy writes it, and as somebody else might."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latchkey_service.access.forwarded import Forwarded, ForwardedError, parse


def said(by=(), uris=(), dns=(), certificate=True, pem=b""):
    return Forwarded(tuple(by), tuple(uris), tuple(dns), pem, certificate)


@pytest.mark.parametrize(
    ("header", "found"),
    [
        # As Envoy 1.40 writes them: all that it can, of a certificate with all names and with none.
        (
            (
                'By=spiffe://a/envoy;By=spiffe://a/two;Hash=4e;Cert="a%20b";Chain="c";Subject="a,b";'
                "URI=spiffe://a/client;DNS=a.internal;DNS=www.a.internal"
            ),
            said(
                ["spiffe://a/envoy", "spiffe://a/two"],
                ["spiffe://a/client"],
                ["a.internal", "www.a.internal"],
                pem=b"a b",
            ),
        ),
        (
            'By=spiffe://a/envoy;Hash=468e;Subject="/C=US/L=San Francisco/CN=a";URI=spiffe://a/client',
            said(["spiffe://a/envoy"], ["spiffe://a/client"]),
        ),
        (
            'Hash=ab;Subject="CN=\\"Quoted, Inc.\\";O=x";URI=;DNS=a.internal;DNS=www.a.internal',
            said(dns=["a.internal", "www.a.internal"]),
        ),
        ("by=x;HASH=y;uri=u", said(["x"], ["u"])),
        ('URI="spiffe://a/b,URI=spiffe://a/c"', said(uris=["spiffe://a/b,URI=spiffe://a/c"])),
        ("By=spiffe://a/envoy", said(["spiffe://a/envoy"], certificate=False)),
        ('By=x;Subject="";URI=', said(["x"], certificate=False)),
    ],
)
def test_what_is_read(header, found):
    """The names in each value and the certificate, quotes and percent-encoding undone."""
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
        # Unquoted, each of these would part something.
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
def test_what_is_refused(header):
    """What is not of the form is refused as a whole, and not read as far as it goes."""
    with pytest.raises(ForwardedError):
        parse(header)


@pytest.mark.parametrize(
    "header",
    [
        # Elements of two proxies; the second is a part of a URI, as Envoy writes that.
        "By=spiffe://a/x;URI=spiffe://a/y,By=spiffe://a/envoy;Hash=ab;URI=spiffe://a/z",
        "By=spiffe://a/envoy;URI=spiffe://a/evil,By=spiffe://a/envoy;URI=spiffe://a/admin",
        "By=spiffe://a/envoy,DNS=a",
        # Parts of a DNS name, or of a URI.
        "By=spiffe://a/envoy;Hash=ab;URI=;DNS=x;URI=spiffe://a/admin",
        "By=spiffe://a/envoy;Hash=ab;URI=x;By=spiffe://a/other",
        "By=spiffe://a/envoy;Hash=ab;DNS=x;Cert=y",
        "By=spiffe://a/envoy;Hash=ab;DNS=x;Subject=y",
        "By=spiffe://a/envoy;Hash=ab;DNS=x;Chain=y",
        "By=spiffe://a/envoy;Hash=ab;DNS=x;Hash=y",
        "By=spiffe://a/envoy;Hash=ab;DNS=x;Other=y",
        "Other=y;By=spiffe://a/envoy;Hash=ab;DNS=x",
        # Names that begin with a semicolon, or end with one.
        "By=spiffe://a/envoy;Hash=ab;URI=;URI=spiffe://a/admin",
        "By=spiffe://a/envoy;Hash=ab;URI=spiffe://a/b;DNS=;DNS=admin.internal",
        "By=spiffe://a/envoy;Hash=ab;DNS=admin.internal;DNS=",
        # What a certificate has one of.
        "By=spiffe://a/envoy;Hash=ab;Hash=cd;URI=x",
        "By=spiffe://a/envoy;Cert=ab;Cert=cd;URI=x",
        "By=spiffe://a/envoy;Chain=ab;Chain=cd;URI=x",
        "By=spiffe://a/envoy;Subject=ab;Subject=cd;URI=x",
    ],
)
def test_what_envoy_does_not_write_by_itself(header):
    """More than one element, other keys, keys in another order, and keys that come again where
    there is one of a thing, are refused: a part of them may be a name's."""
    with pytest.raises(ForwardedError):
        parse(header)


VALUES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=20)


def quoted(value):
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


@given(st.lists(VALUES.filter(bool), min_size=1, max_size=5))
def test_a_quoted_value_stays_one(values):
    """Whatever is in a quoted value adds no other pair and no other element."""
    found = parse(";".join(f"DNS={quoted(value)}" for value in values))
    assert found == said(dns=values, certificate=True)


@given(st.text(max_size=100))
def test_any_text_is_read_or_refused(text):
    """Nothing else comes of a header, whatever it is."""
    with contextlib.suppress(ForwardedError):
        parse(text)
