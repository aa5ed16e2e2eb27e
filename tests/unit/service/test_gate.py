"""The door of a listener: what it says of certificates and headers, and what it remembers."""

import tracemalloc
from hashlib import sha256
from urllib.parse import quote

import pytest
from cryptography import x509
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_service.access import gate
from latchkey_service.access.gate import Door, Gate, within_accounts
from latchkey_service.access.policy import Accounts, Caller, parse
from latchkey_service.errors import Denied

from tests.callers import PROXY, credential, dns_identity, made, policy_text, spiffe_identity, uri


class Call:
    """What a servicer's context tells of a call."""

    def __init__(self, header=None, identity=None):
        self._metadata = [] if header is None else [("x-forwarded-client-cert", header)]
        self._tls = {} if identity is None else {"x509_pem_cert": [identity.certificate]}

    def invocation_metadata(self):
        return self._metadata

    def auth_context(self):
        return self._tls


def outcome(door, call):
    try:
        return door.identify(call).name
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
    """A certificate's holder is who its names say, whole, asked once or again; what is refused has
    the reason."""
    door = Door(Gate(parse(policy_text())), tls=True)
    for _ in range(2):
        assert outcome(door, Call(identity=identity)) == expected


def told(identity, names=""):
    """What Envoy says with the certificate itself."""
    return Call(f'By={PROXY};Hash=ab;Cert="{quote(identity.certificate, safe="")}"{names}')


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (told(spiffe_identity(uri("verifier"))), "verifier"),
        (told(dns_identity("x.internal", "verifier.internal")), "verifier"),
        # What is in the certificate counts, and nothing that is said of it.
        (told(dns_identity("verifier.internal"), ";URI=;DNS=manager.internal"), "verifier"),
        (told(dns_identity("x.internal"), ";URI=;DNS=manager.internal"), "CERTIFICATE_UNKNOWN"),
        (told(made([x509.DNSName("x;DNS=manager.internal")])), "CERTIFICATE_UNKNOWN"),
        (told(made([x509.DNSName("verifier.internal\0")])), "CERTIFICATE_MALFORMED"),
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
    """A proxy's header names the holder of the certificate in it, where it has one."""
    door = Door(Gate(parse(policy_text())), proxy=PROXY)
    for _ in range(2):
        assert outcome(door, call) == expected


def test_a_guessable_credential_is_none():
    """What was not made by us is nobody's credential, also if a policy has its digest."""
    good = credential("verifier")
    for text in ("test", "", f"{good} ", good[:-1], good.replace("lkc_", "lkd_"), f"x{good}"):
        digest = sha256(text.encode()).hexdigest()
        policy = parse(f'[callers.a]\ncredentials = ["sha256:{digest}"]\nroles = ["manager"]\n')
        call = Call()
        call._metadata.append(("authorization", f"Bearer {text}"))
        assert outcome(Door(Gate(policy)), call) == "CREDENTIAL_MALFORMED", text


def test_a_certificate_that_ends():
    """A certificate that was good when its connection began is refused from its end on, as it is
    when its first call comes after that, on a session that was resumed."""
    identity = spiffe_identity(uri("verifier"))
    ends_at = x509.load_pem_x509_certificate(identity.certificate).not_valid_after_utc.timestamp()
    time = ends_at - 0.1
    gate = Gate(parse(policy_text()))
    ways = [
        (Door(gate, tls=True, now=lambda: time), Call(identity=identity)),
        (Door(gate, proxy=PROXY, now=lambda: time), told(identity)),
    ]
    for door, call in ways:
        assert outcome(door, call) == "verifier"
    time = ends_at
    for door, call in ways:
        assert [outcome(door, call), outcome(door, call)] == ["CERTIFICATE_EXPIRED"] * 2
    late = Door(gate, tls=True, now=lambda: time)
    assert outcome(late, Call(identity=identity)) == "CERTIFICATE_EXPIRED"


def test_what_is_remembered_is_the_policys():
    """What was read of a certificate or a header holds under the policy of then, and no longer."""
    gate = Gate(parse(policy_text()))
    ways = [
        (Door(gate, tls=True), Call(identity=spiffe_identity(uri("verifier")))),
        (Door(gate, proxy=PROXY), Call(f"By={PROXY};Hash=ab;URI={uri('verifier')}")),
    ]
    for door, call in ways:
        assert [outcome(door, call), outcome(door, call)] == ["verifier", "verifier"]
    gate.replace(parse(policy_text(["manager"])))
    for door, call in ways:
        assert outcome(door, call) == "CERTIFICATE_UNKNOWN"
    gate.replace(parse(policy_text()))
    for door, call in ways:
        assert outcome(door, call) == "verifier"


def test_what_is_remembered_is_bounded(monkeypatch):
    """However many headers come, and however long each is, they take no more memory than their
    bound, and a header more."""
    bound, size = 256 * 1024, 16_000
    monkeypatch.setattr(gate, "REMEMBERED_BYTES_MAX", bound)
    door = Door(Gate(parse(policy_text())), proxy=PROXY)
    names = f"By={PROXY};Hash=ab;URI={uri('verifier')}"
    tracemalloc.start()
    try:
        for number in range(200):
            filler = "x" * (size - len(names))
            header = f"By={PROXY};Hash={number:05}{filler};URI={uri('verifier')}"
            assert outcome(door, Call(header)) == "verifier"
        for number in range(5_000):
            assert outcome(door, Call(f"{names};DNS={number}.internal")) == "verifier"
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 2 * bound


def verification(verdict, account_id=None):
    """Return an answer with a position, and with a token where the secret has one."""
    answer = pb.VerifyResponse(verdict=verdict, revision=7, mark=2**64 - 1)
    if account_id is not None:
        answer.token.id, answer.token.account_id = "t1", account_id
    return answer


@pytest.mark.parametrize("verdict", [pb.VERDICT_VALID, pb.VERDICT_DELETED, pb.VERDICT_EXPIRED])
@pytest.mark.parametrize("batch", [False, True])
def test_a_foreign_secret_looks_as_if_nobody_had_made_it(verdict, batch):
    """A caller that is limited to accounts gets no revision and no mark that say otherwise, neither
    of another account's token nor of one that was purged."""
    caller = Caller("a", frozenset(), accounts=Accounts(frozenset({"acme"}), ()))
    own = verification(verdict, "acme")
    foreign = verification(verdict, "globex")
    purged = verification(pb.VERDICT_UNKNOWN)
    unknown = pb.VerifyResponse(verdict=pb.VERDICT_UNKNOWN)
    malformed = pb.VerifyResponse(verdict=pb.VERDICT_MALFORMED)
    said = [own, foreign, purged, unknown, malformed]
    expected = [own, unknown, unknown, unknown, malformed]
    if batch:
        encoded = pb.BatchVerifyResponse(responses=said).SerializeToString()
        answer = within_accounts("/latchkey.v1.TokenService/BatchVerify", caller, encoded)
        assert list(pb.BatchVerifyResponse.FromString(answer).responses) == expected
    else:
        for one, another in zip(said, expected, strict=True):
            path = "/latchkey.v1.TokenService/Verify"
            answer = within_accounts(path, caller, one.SerializeToString())
            assert pb.VerifyResponse.FromString(answer) == another
