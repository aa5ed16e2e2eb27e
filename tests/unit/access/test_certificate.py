"""Names in a client certificate: all names that its CA signed, complete, or none."""

import contextlib
import ssl

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st
from latchkey_service.access.certificate import CertificateError, read_certificate

from tests.helpers.callers import ca_pem, made

DNS, URI = x509.DNSName, x509.UniformResourceIdentifier
# Other kinds of names that any CA signs, one of each.
OTHERS = [
    x509.RFC822Name("a@example.org"),
    x509.DirectoryName(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a.internal")])),
    x509.OtherName(x509.ObjectIdentifier("1.2.3"), b"\x0c\x0aa.internal"),
    x509.RegisteredID(x509.ObjectIdentifier("1.2.3")),
]


def der(*names):
    return ssl.PEM_cert_to_DER_cert(made(names).certificate.decode())


def pem(der):
    return ssl.DER_cert_to_PEM_cert(der)


def names_of(text):
    return read_certificate(text)[:2]


PLAIN = der(DNS("shop.internal"), URI("spiffe://example.org/shop"))


def test_names():
    """Only URIs and DNS names are returned, separately, in order and at any length. A certificate
    without such names has none."""
    names = [DNS("b.internal"), *OTHERS, URI("spiffe://example.org/shop"), DNS("a.internal")]
    many = [f"{number}.{'a' * 200}.internal" for number in range(400)]
    assert names_of(pem(der(*names))) == (
        ("spiffe://example.org/shop",),
        ("b.internal", "a.internal"),
    )
    assert names_of(pem(der(*map(DNS, many)))) == ((), tuple(many))
    assert names_of(ca_pem().decode()) == ((), ())
    assert names_of(pem(der(*OTHERS))) == ((), ())


VISIBLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=300)


@given(st.lists(st.tuples(st.sampled_from([DNS, URI]), VISIBLE), max_size=5))
def test_names_are_complete(names):
    """Every printable character of a name is returned."""
    uris, dns = names_of(pem(der(*[kind(value) for kind, value in names])))
    assert uris == tuple(value for kind, value in names if kind is URI)
    assert dns == tuple(value for kind, value in names if kind is DNS)


@pytest.mark.parametrize("kind", [DNS, URI])
@pytest.mark.parametrize(
    "name", ["shop.internal\0.evil.example", "\0", "shop\0", "\0shop", "a\nb", "\x7f"]
)
def test_control_characters_invalidate_a_certificate(kind, name):
    """A NUL or another control character in one name invalidates all names of a certificate."""
    with pytest.raises(CertificateError):
        names_of(pem(der(DNS("good.internal"), kind(name))))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # Not ASCII.
        (b"shop.internal", b"sh\xf6p.internal"),
        # A wrong length, or a length that is not in its shortest form.
        (b"\x82\x0dshop.internal", b"\x82\x0cshop.internal"),
        (b"\x82\x0dshop.internal", b"\x82\x7fshop.internal"),
        (b"\x82\x0dshop.internal", b"\x82\x80shop.internal"),
        (b"\x82\x0dshop.internal", b"\x82\x81\x0cshop.interna"),
        (b"\x82\x0dshop.internal", b"\x82\x82\x00\x0bshop.intern"),
        (b"\x82\x0dshop.internal", b"\x82\xffshop.internal"),
        # A different type where the extensions and the names are.
        (b"\x04\x2c\x30\x2a\x82", b"\x04\x2c\x31\x2a\x82"),
        (b"\x04\x2c\x30\x2a\x82", b"\x04\x2c\x30\x29\x82"),
        # A multi-byte tag where the tag of a name is.
        (b"\x82\x0dshop.internal", b"\x9f\x02\x0cshop.interna"),
    ],
)
def test_invalid_der_is_rejected(old, new):
    """A certificate that is not valid DER is not misread as a valid one."""
    assert PLAIN.count(old) == 1
    with pytest.raises(CertificateError):
        names_of(pem(PLAIN.replace(old, new)))


def test_two_name_extensions_are_rejected():
    """A certificate with two name extensions is invalid (RFC 5280 §4.2: at most one of a kind)."""
    again = b"\x06\x03\x55\x1d\x11"
    other = b"\x06\x03\x55\x1d\x12"
    certificate = made(
        [DNS("shop.internal")],
        more=[x509.IssuerAlternativeName([DNS("admin.internal")])],
    )
    data = ssl.PEM_cert_to_DER_cert(certificate.certificate.decode())
    assert names_of(pem(data)) == ((), ("shop.internal",))
    assert data.count(other) == 1
    with pytest.raises(CertificateError):
        names_of(pem(data.replace(other, again)))


@given(st.data())
def test_random_damage(data):
    """A damaged certificate yields names or CertificateError, never another exception."""
    damaged = bytearray(PLAIN)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(PLAIN) - 1))] = data.draw(st.integers(0, 255))
    # Most keep their length: a truncated certificate is rejected early.
    del damaged[data.draw(st.just(len(PLAIN)) | st.integers(0, len(PLAIN))) :]
    with contextlib.suppress(CertificateError):
        names_of(pem(bytes(damaged)))


def test_damage_to_each_byte():
    """The same holds for a change of each single byte."""
    for position, byte in enumerate(PLAIN):
        for other in {0, 1, 2, 0x7F, 0x80, 0xFF, byte ^ 1} - {byte}:
            damaged = PLAIN[:position] + bytes([other]) + PLAIN[position + 1 :]
            with contextlib.suppress(CertificateError):
                names_of(pem(damaged))


@given(st.one_of(st.text(), st.binary().map(pem)))
def test_any_text(text):
    """Any text is a certificate or raises CertificateError."""
    with contextlib.suppress(CertificateError):
        names_of(text)
