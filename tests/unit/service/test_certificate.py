"""The names in a client's certificate: those that its CA has signed, whole, or none."""

import contextlib
import ssl

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st
from latchkey_service.access.certificate import CertificateError, read_certificate

from tests.callers import ca_pem, made

DNS, URI = x509.DNSName, x509.UniformResourceIdentifier
# What any CA signs: each kind of name in turn.
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
    """URIs and DNS names are told apart from each other and from all else, in their order, however
    long; a certificate without any has none."""
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
def test_names_are_whole(names):
    """Whatever is printable in a name is in what is read of it."""
    uris, dns = names_of(pem(der(*[kind(value) for kind, value in names])))
    assert uris == tuple(value for kind, value in names if kind is URI)
    assert dns == tuple(value for kind, value in names if kind is DNS)


@pytest.mark.parametrize("kind", [DNS, URI])
@pytest.mark.parametrize(
    "name", ["shop.internal\0.evil.example", "\0", "shop\0", "\0shop", "a\nb", "\x7f"]
)
def test_what_is_no_name(kind, name):
    """A certificate with a NUL or another control character in a name has no names at all."""
    with pytest.raises(CertificateError):
        names_of(pem(der(DNS("good.internal"), kind(name))))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # Not ASCII.
        (b"shop.internal", b"sh\xf6p.internal"),
        # Of another length, or of one in another form than the shortest.
        (b"\x82\x0dshop.internal", b"\x82\x0cshop.internal"),
        (b"\x82\x0dshop.internal", b"\x82\x7fshop.internal"),
        (b"\x82\x0dshop.internal", b"\x82\x80shop.internal"),
        (b"\x82\x0dshop.internal", b"\x82\x81\x0cshop.interna"),
        (b"\x82\x0dshop.internal", b"\x82\x82\x00\x0bshop.intern"),
        (b"\x82\x0dshop.internal", b"\x82\xffshop.internal"),
        # Something else where the extensions are, and where the names are.
        (b"\x04\x2c\x30\x2a\x82", b"\x04\x2c\x31\x2a\x82"),
        (b"\x04\x2c\x30\x2a\x82", b"\x04\x2c\x30\x29\x82"),
        # A tag of several bytes, where a name's stands.
        (b"\x82\x0dshop.internal", b"\x9f\x02\x0cshop.interna"),
    ],
)
def test_what_is_no_certificate(old, new):
    """One that is not as DER has it is not read as something else."""
    assert PLAIN.count(old) == 1
    with pytest.raises(CertificateError):
        names_of(pem(PLAIN.replace(old, new)))


def test_two_lists_of_names():
    """Of two extensions with names neither is believed (RFC 5280 §4.2: one at most of a kind)."""
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
def test_damaged_certificates(data):
    """Nothing else comes of a damaged certificate than names or the error."""
    damaged = bytearray(PLAIN)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(PLAIN) - 1))] = data.draw(st.integers(0, 255))
    # Most are left whole: the end of what is cut off shows at once.
    del damaged[data.draw(st.just(len(PLAIN)) | st.integers(0, len(PLAIN))) :]
    with contextlib.suppress(CertificateError):
        names_of(pem(bytes(damaged)))


def test_each_damaged_byte():
    """The same of each byte by itself."""
    for position, byte in enumerate(PLAIN):
        for other in {0, 1, 2, 0x7F, 0x80, 0xFF, byte ^ 1} - {byte}:
            damaged = PLAIN[:position] + bytes([other]) + PLAIN[position + 1 :]
            with contextlib.suppress(CertificateError):
                names_of(pem(damaged))


@given(st.one_of(st.text(), st.binary().map(pem)))
def test_any_text(text):
    """Any text is a certificate or is refused."""
    with contextlib.suppress(CertificateError):
        names_of(text)
