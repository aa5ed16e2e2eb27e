"""The policy file: its contents, and errors that name the place of a mistake."""

import contextlib
import textwrap
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latchkey_service.access.credentials import DIGEST, digest_of, mint, policy_digest
from latchkey_service.access.methods import METHODS, OPEN, rule_of
from latchkey_service.access.policy import WATCHES_MAX, PolicyError, parse
from latchkey_service.lifetime import UNLIMITED, Lifetime

DIGEST_A, DIGEST_B = ("sha256:" + letter * 64 for letter in "ab")
GOOD = f"""\
[callers.shop]
certificates = ["spiffe://example.org/shop", "Shop.Internal"]
credentials = ["{DIGEST_A}", "{DIGEST_B}"]
roles = ["verifier", "auditor"]
accounts = ["acme", "team-*"]

[callers.admin]
certificates = ["admin.internal"]
roles = ["manager"]

[roles.auditor]
methods = ["/latchkey.v1.AuditService/List"]
"""
CREDENTIAL = "lkc_" + "x" * 49


def test_policy_contents():
    """Callers are found by certificate name and digest, with the methods of all their roles."""
    policy = parse(GOOD)
    shop = policy.certificates["spiffe://example.org/shop"]
    assert shop.name == "shop"
    assert policy.certificates["shop.internal"] is shop
    assert policy.credentials.get(bytes.fromhex("a" * 64)) is shop
    assert policy.credentials.get(bytes.fromhex("b" * 64)) is shop
    # A matching prefix is not enough.
    assert policy.credentials.get(bytes.fromhex("a" * 63 + "b")) is None
    assert policy.credentials.get(bytes(32)) is None
    tokens = "/latchkey.v1.TokenService/"
    audit = "/latchkey.v1.AuditService/List"
    assert shop.methods == {tokens + "Verify", tokens + "BatchVerify", tokens + "Watch", audit}
    admin = policy.certificates["admin.internal"]
    assert admin.methods == {
        tokens + name
        for name in (
            *("Create", "Get", "GetLimits", "GetUsage", "List", "Delete", "DeleteAll"),
            *("Update", "Disable", "Enable", "Rotate", "RetireSecrets"),
        )
    }
    assert policy.callers == {"shop", "admin"}
    assert admin.accounts is None
    assert shop.accounts is not None
    for account, allowed in {
        "acme": True,
        "team-": True,
        "team-red": True,
        "acme2": False,
        "ACME": False,
        "team": False,
        "": False,
        "my-team-red": False,
    }.items():
        assert shop.accounts.allow(account) is allowed, account


def test_lifetimes() -> None:
    """A caller's tokens have the limit of the caller, and those of accounts and prefixes."""
    policy = parse(
        '[callers.a]\ncertificates = ["a.internal"]\nmax_ttl = "90d"\n'
        '[callers.b]\ncertificates = ["b.internal"]\n'
        '[accounts.acme]\nrequire_expiry = true\n[accounts."team-*"]\nmax_ttl = "12h"\n'
    )
    limited, free = (policy.certificates[f"{name}.internal"].lifetimes for name in "ab")
    assert limited.limit("other") == Lifetime(timedelta(days=90))
    assert limited.limit("acme") == Lifetime(timedelta(days=90), require_expiry=True)
    assert free.limit("other") == UNLIMITED
    assert free.limit("acme") == Lifetime(require_expiry=True)
    assert free.limit("team-red") == limited.limit("team-red") == Lifetime(timedelta(hours=12))


def test_empty_policy_allows_nothing():
    """A caller without roles has no rights, and a caller without identities does not exist."""
    assert parse("").callers == frozenset()
    policy = parse('[callers.a]\ncertificates = ["a.internal"]\naccounts = []\n[callers.b]\n')
    caller = policy.certificates["a.internal"]
    assert caller.methods == frozenset()
    assert caller.accounts is not None
    assert not caller.accounts.allow("acme")
    assert policy.callers == {"a"}


SHOP = "[callers.shop]\n"


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("[callers.a\nroles = []", "is not TOML", "line 1"),
        (SHOP + "roles = [\n", "is not TOML", "end of document"),
        (SHOP + "roles = []\nroles = []\n", "is not TOML", "line 3"),
        (SHOP + "roles = [" + "[" * 10_000, "is not TOML", "nested too deeply"),
        (SHOP + "roles = [" + "9" * 5_000, "is not TOML", "too many digits"),
        ("x = 1", "x", "unknown key; known: accounts, callers, roles"),
        (SHOP + "role = []", "callers.shop.role", "known: accounts, certificates, credentials"),
        ("[roles.x]\nrole = []", "roles.x.role", "unknown key; known: methods"),
        ("callers = 1", "callers", "must be a table"),
        ("callers.shop = 1", "callers.shop", "must be a table"),
        ('["[key]"]', "'[key]'", "unknown key"),
        ('[callers."a b"]\nroles = []', "callers.'a b'", "'a b' is not a name"),
        (SHOP + 'roles = ["wizard"]', "callers.shop.roles", "unknown role 'wizard'; known: ver"),
        ('[callers."a.b"]\nroles = ["wizard"]', "callers.'a.b'.roles", "unknown role"),
        (SHOP + 'roles = "verifier"', "callers.shop.roles", "must be a list"),
        (SHOP + "roles = [1]", "callers.shop.roles.0", "valid string"),
        (SHOP + 'roles = ["verifier", "verifier"]', "callers.shop.roles", "duplicate"),
        (SHOP + 'max_ttl = "90"', "callers.shop.max_ttl", "a duration such as 90d, 12h"),
        (SHOP + "max_ttl = 90", "callers.shop.max_ttl", "valid string"),
        (SHOP + 'require_expiry = "yes"', "callers.shop.require_expiry", "valid boolean"),
        (
            SHOP + 'max_ttl = "9d"\nrequire_expiry = false',
            "callers.shop",
            "max_ttl requires an expiry; remove require_expiry = false",
        ),
        ('[accounts."te*am"]', "accounts.'te*am'", "neither an account nor a prefix"),
        ('[accounts."*"]', "accounts.'*'", "neither an account nor a prefix"),
        ("[accounts.acme]\nroles = []", "accounts.acme.roles", "known: max_ttl, require_expiry"),
        (SHOP + 'accounts = ["a", "te*am"]', "callers.shop.accounts.1", "te*am"),
        (SHOP + 'accounts = ["*"]', "callers.shop.accounts.0", "omit accounts"),
        (SHOP + 'accounts = [""]', "callers.shop.accounts.0", "neither"),
        (SHOP + 'certificates = ["*.internal"]', "callers.shop.certificates.0", "DNS name"),
        (SHOP + 'certificates = ["https://a"]', "callers.shop.certificates.0", "spiffe"),
        (SHOP + 'certificates = ["spiffe://A.b/c"]', "callers.shop.certificates.0", "spiffe"),
        (SHOP + 'certificates = [""]', "callers.shop.certificates.0", "DNS name"),
        (SHOP + 'certificates = ["x", "X"]', "callers.shop.certificates", "duplicate"),
        (
            SHOP + 'certificates = ["x"]\n[callers.b]\ncertificates = ["X"]',
            "callers.b.certificates",
            "already belongs to shop",
        ),
        (SHOP + f'credentials = ["{CREDENTIAL}"]', "callers.shop.credentials.0", "never the cre"),
        (SHOP + 'credentials = ["sha256:AB"]', "callers.shop.credentials.0", "64 hexadecimal"),
        (
            SHOP + f'credentials = ["{DIGEST_A}"]\n[callers.b]\ncredentials = ["{DIGEST_A}"]',
            "callers.b.credentials",
            "already belongs to shop",
        ),
        (SHOP + f'roles = ["{CREDENTIAL}"]', "callers.shop.roles", "lkc_…"),
        (f"[callers.{CREDENTIAL}]\nrole = []", "callers.lkc_….role", "unknown key"),
        (SHOP + "rates = 5", "callers.shop.rates", "must be a table"),
        (SHOP + "rates.nobody = 5", "callers.shop.rates.nobody", "unknown role; known: verif"),
        (SHOP + "rates.manager = 0", "callers.shop.rates.manager", "greater than or equal to 1"),
        (SHOP + "rates.manager = 1000001", "callers.shop.rates.manager", "equal to 1000000"),
        (SHOP + "rates.manager = true", "callers.shop.rates.manager", "valid integer"),
        (SHOP + "rates.manager = 1.5", "callers.shop.rates.manager", "valid integer"),
        (SHOP + "watches = -1", "callers.shop.watches", "greater than or equal to 0"),
        (SHOP + "watches = 10001", "callers.shop.watches", "less than or equal to 10000"),
        (SHOP + "watches = false", "callers.shop.watches", "valid integer"),
        (SHOP + 'watches = "many"', "callers.shop.watches", "valid integer"),
        ("[roles.verifier]\nmethods = []", "roles.verifier", "built in"),
        ('[roles.x]\nmethods = ["/v1/Rename"]', "roles.x.methods.0", "unknown method"),
        (
            '[roles.x]\nmethods = ["/latchkey.v1.TokenService/*"]',
            "roles.x.methods.0",
            "unknown method",
        ),
    ],
    ids=lambda value: value[:40],
)
def test_mistakes(text: str, place: str, reason: str) -> None:
    """The error names the place and what to do. It never shows what may be a credential."""
    with pytest.raises(PolicyError) as caught:
        parse(text)
    assert str(caught.value).startswith(f"{place}: "), caught.value
    assert reason in str(caught.value)
    assert CREDENTIAL not in str(caught.value)


def test_several_mistakes() -> None:
    """The error lists the mistakes, and counts those beyond the first ten."""
    with pytest.raises(PolicyError) as caught:
        parse("x = 1\n" + "".join(f"[callers.c{number}]\nrole = []\n" for number in range(12)))
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines[:2]] == ["callers.c0.role", "callers.c1.role"]
    assert (len(lines), lines[-1]) == (11, "and 3 more")


@given(st.text())
def test_any_text(text):
    """Any text is a policy or raises PolicyError, never another exception."""
    with contextlib.suppress(PolicyError):
        parse(text)


@given(st.binary(min_size=32, max_size=32))
def test_credentials(random):
    """A credential has the shape that scanners know, and its digest in the policy identifies it."""
    credential = mint(lambda size: random[:size])
    text = credential.reveal()
    assert text.startswith("lkc_")
    assert len(text) == 53
    assert text not in repr(credential)
    match = DIGEST.fullmatch(policy_digest(credential))
    assert match is not None
    assert bytes.fromhex(match[1]) == digest_of(text)
    assert digest_of(text[:-1]) != digest_of(text)


def test_unlisted_method_is_not_served():
    """Adding a method requires a rule for who may call it. Only methods of public gRPC protocols
    are open to everyone."""
    with pytest.raises(LookupError, match=r"access/methods\.py"):
        rule_of("/latchkey.v1.TokenService/Rename")
    for path, rule in METHODS.items():
        assert (rule == OPEN) == path.startswith("/grpc."), path


def test_large_policy():
    """A large policy can be parsed, and the path leads to a mistake in it."""
    text = "".join(
        textwrap.dedent(
            f"""\
            [callers.c{number}]
            certificates = ["c{number}.internal"]
            roles = ["verifier"]
            """
        )
        for number in range(2_000)
    )
    assert len(parse(text).callers) == 2_000
    with pytest.raises(PolicyError, match=r"^callers\.last\.roles: "):
        parse(text + '[callers.last]\nroles = ["wizard"]\n')


def test_limits() -> None:
    """Limits apply per caller. By default, rates have no limit, and streams have the usual one."""
    policy = parse(
        '[callers.a]\ncertificates = ["a"]\nrates = { verifier = 7 }\nwatches = 0\n'
        '[callers.b]\ncertificates = ["b"]\n'
    )
    limited, free = policy.certificates["a"], policy.certificates["b"]
    assert limited.rates is not None
    assert (limited.rates.per_second, limited.watches_max) == ({"verifier": 7}, 0)
    assert (free.rates, free.watches_max) == (None, WATCHES_MAX)
