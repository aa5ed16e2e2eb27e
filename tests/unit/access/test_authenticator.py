"""A listener's authenticator: certificates, proxy headers, credentials, and its cache."""

import tracemalloc
from hashlib import sha256
from urllib.parse import quote

import pytest
from cryptography import x509
from latchkey_service.access import authenticator as authenticator_module
from latchkey_service.access.authenticator import ActivePolicy, Authenticator
from latchkey_service.access.policy import parse
from latchkey_service.errors import Denied

from tests.helpers.callers import (
    PROXY,
    credential,
    dns_identity,
    made,
    policy_text,
    spiffe_identity,
    uri,
)


class Call:
    """The part of a servicer's context that identifies the caller."""

    def __init__(self, header=None, identity=None):
        self._metadata = [] if header is None else [("x-forwarded-client-cert", header)]
        self._tls = {} if identity is None else {"x509_pem_cert": [identity.certificate]}

    def invocation_metadata(self):
        return self._metadata

    def auth_context(self):
        return self._tls


def outcome(authenticator, call):
    try:
        return authenticator.identify(call).name
    except Denied as error:
        return error.reason


@pytest.mark.parametrize(
    ("identity", "expected"),
    [
        (spiffe_identity(uri("verifier")), "verifier"),
        (dns_identity("other.internal", "Verifier.internal"), "verifier"),
        (made([x509.DNSName("verifier.internal\0.evil.example")]), "CERTIFICATE_MALFORMED"),
        (made([x509.UniformResourceIdentifier(uri("verifier") + "\0")]), "CERTIFICATE_MALFORMED"),
        (spiffe_identity(uri("verifier"), "https://example.org"), "CERTIFICATE_MALFORMED"),
        (spiffe_identity("https://example.org"), "CERTIFICATE_UNKNOWN"),
        (None, "CALLER_ANONYMOUS"),
    ],
)
def test_certificates(identity, expected):
    """The complete names of a certificate identify its holder, on the first call and from the
    cache. A rejected certificate gives the right reason."""
    authenticator = Authenticator(ActivePolicy(parse(policy_text())), tls=True)
    for _ in range(2):
        assert outcome(authenticator, Call(identity=identity)) == expected


def via_envoy(identity, names=""):
    """The header that Envoy sends with the certificate."""
    return Call(f'By={PROXY};Hash=ab;Cert="{quote(identity.certificate, safe="")}"{names}')


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (via_envoy(spiffe_identity(uri("verifier"))), "verifier"),
        (via_envoy(dns_identity("x.internal", "verifier.internal")), "verifier"),
        # Only the names in the certificate count, not those in the header.
        (via_envoy(dns_identity("verifier.internal"), ";URI=;DNS=manager.internal"), "verifier"),
        (
            via_envoy(dns_identity("x.internal"), ";URI=;DNS=manager.internal"),
            "CERTIFICATE_UNKNOWN",
        ),
        (via_envoy(made([x509.DNSName("x;DNS=manager.internal")])), "CERTIFICATE_UNKNOWN"),
        (via_envoy(made([x509.DNSName("verifier.internal\0")])), "CERTIFICATE_MALFORMED"),
        (Call(f'By={PROXY};Cert="x";URI={uri("verifier")}'), "CERTIFICATE_MALFORMED"),
        (Call(f'By={PROXY};Cert="%ff";URI={uri("verifier")}'), "CERTIFICATE_MALFORMED"),
        (Call(f'By={PROXY};Cert="";URI={uri("verifier")}'), "verifier"),
        (Call(f"By={PROXY};URI={uri('verifier')},By={PROXY}"), "PROXY_MALFORMED"),
        (Call(f"By={PROXY};DNS=\xff".encode("latin-1")), "PROXY_MALFORMED"),
        (Call(f"URI={uri('verifier')}"), "PROXY_UNKNOWN"),
        (Call(f"By={PROXY}"), "CALLER_ANONYMOUS"),
    ],
)
def test_certificates_through_a_proxy(call, expected):
    """A proxy's header identifies the holder of the certificate in it, if there is one."""
    authenticator = Authenticator(ActivePolicy(parse(policy_text())), proxy=PROXY)
    for _ in range(2):
        assert outcome(authenticator, call) == expected


def test_white_space_around_a_credential_does_not_count():
    """Any number of spaces before it, and white space after it, are not part of the credential."""
    policy = parse(policy_text())
    for value in ("  {}", "{} ", " {} \t"):
        call = Call()
        call._metadata.append(("authorization", f"Bearer {value.format(credential('verifier'))}"))
        assert outcome(Authenticator(ActivePolicy(policy)), call) == "verifier", value


def test_guessable_credential_is_rejected():
    """Only credentials that we minted are accepted, even if a policy has the digest of another."""
    good = credential("verifier")
    for text in ("test", "", f"{good} x", good[:-1], good.replace("lkc_", "lkd_"), f"x{good}"):
        digest = sha256(text.encode()).hexdigest()
        policy = parse(f'[callers.a]\ncredentials = ["sha256:{digest}"]\nroles = ["manager"]\n')
        call = Call()
        call._metadata.append(("authorization", f"Bearer {text}"))
        assert outcome(Authenticator(ActivePolicy(policy)), call) == "CREDENTIAL_MALFORMED", text


def test_expired_certificate():
    """A certificate that expires during a connection is rejected from then on. So is one whose
    first call comes after its expiry, on a resumed session."""
    identity = spiffe_identity(uri("verifier"))
    ends_at = x509.load_pem_x509_certificate(identity.certificate).not_valid_after_utc.timestamp()
    time = ends_at - 0.1
    active = ActivePolicy(parse(policy_text()))
    ways = [
        (Authenticator(active, tls=True, now=lambda: time), Call(identity=identity)),
        (Authenticator(active, proxy=PROXY, now=lambda: time), via_envoy(identity)),
    ]
    for authenticator, call in ways:
        assert outcome(authenticator, call) == "verifier"
    time = ends_at
    for authenticator, call in ways:
        assert [outcome(authenticator, call), outcome(authenticator, call)] == [
            "CERTIFICATE_EXPIRED"
        ] * 2
    late = Authenticator(active, tls=True, now=lambda: time)
    assert outcome(late, Call(identity=identity)) == "CERTIFICATE_EXPIRED"


def test_cache_depends_on_the_policy():
    """A cached identity is only used under the policy that it was read with."""
    active = ActivePolicy(parse(policy_text()))
    ways = [
        (Authenticator(active, tls=True), Call(identity=spiffe_identity(uri("verifier")))),
        (Authenticator(active, proxy=PROXY), Call(f"By={PROXY};Hash=ab;URI={uri('verifier')}")),
    ]
    for authenticator, call in ways:
        assert [outcome(authenticator, call), outcome(authenticator, call)] == [
            "verifier",
            "verifier",
        ]
    active.replace(parse(policy_text(["manager"])))
    for authenticator, call in ways:
        assert outcome(authenticator, call) == "CERTIFICATE_UNKNOWN"
    active.replace(parse(policy_text()))
    for authenticator, call in ways:
        assert outcome(authenticator, call) == "verifier"


def test_cache_is_bounded(monkeypatch):
    """However many headers arrive, and however long they are, the cache uses no more memory than
    its bound and one header."""
    bound, size = 256 * 1024, 16_000
    monkeypatch.setattr(authenticator_module, "CACHE_BYTES_MAX", bound)
    authenticator = Authenticator(ActivePolicy(parse(policy_text())), proxy=PROXY)
    names = f"By={PROXY};Hash=ab;URI={uri('verifier')}"
    tracemalloc.start()
    try:
        for number in range(200):
            filler = "x" * (size - len(names))
            header = f"By={PROXY};Hash={number:05}{filler};URI={uri('verifier')}"
            assert outcome(authenticator, Call(header)) == "verifier"
        for number in range(5_000):
            assert outcome(authenticator, Call(f"{names};DNS={number}.internal")) == "verifier"
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 2 * bound
