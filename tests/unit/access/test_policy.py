"""The policy file: its contents, and errors that name the line of a mistake."""

import contextlib
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latchkey_service.access.credentials import DIGEST, digest_of, mint, policy_digest
from latchkey_service.access.methods import METHODS, OPEN, rule_of
from latchkey_service.access.policy import WATCHES_MAX, PolicyError, parse

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
    assert policy.by_credential(bytes.fromhex("a" * 64)) is shop
    assert policy.by_credential(bytes.fromhex("b" * 64)) is shop
    # A matching prefix is not enough.
    assert policy.by_credential(bytes.fromhex("a" * 63 + "b")) is None
    assert policy.by_credential(bytes(32)) is None
    tokens = "/latchkey.v1.TokenService/"
    audit = "/latchkey.v1.AuditService/List"
    assert shop.methods == {tokens + "Verify", tokens + "BatchVerify", tokens + "Watch", audit}
    admin = policy.certificates["admin.internal"]
    assert admin.methods == {
        tokens + name
        for name in (
            *("Create", "Get", "List", "Delete", "DeleteAll"),
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


def test_empty_policy_allows_nothing():
    """A caller without roles has no rights, and a caller without identities does not exist."""
    assert parse("").callers == frozenset()
    policy = parse('[callers.a]\ncertificates = ["a.internal"]\naccounts = []\n[callers.b]\n')
    caller = policy.certificates["a.internal"]
    assert caller.methods == frozenset()
    assert caller.accounts is not None
    assert not caller.accounts.allow("acme")
    assert policy.callers == {"a"}


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("[callers.a\nroles = []", 1, "expected"),
        ("[callers.a]\nroles = [\n", 2, "value"),
        ("[callers.a]\nroles = []\nroles = []", 3, "overwrite"),
        ('x = 1\n[callers.a]\nroles = ["verifier"]', 1, "'x'"),
        ('[callers.a]\nroles = ["verifier"]\n[callers.b]\nroles = ["wizard"]', 4, "wizard"),
        ('[callers.a]\nroles = [\n  "verifier",\n  "wizard",\n]\n[callers.b]\n', 2, "wizard"),
        ("[callers.a]\nrole = []", 2, "'role'"),
        ('[callers.a]\nroles = "verifier"', 2, "list of strings"),
        ("[callers.a]\nroles = [1]", 2, "list of strings"),
        ('[callers.a]\nroles = ["verifier", "verifier"]', 2, "duplicate"),
        ('[callers.a]\n\naccounts = ["te*am"]', 3, "te*am"),
        ('[callers.a]\naccounts = ["*"]', 2, "omit accounts"),
        ('[callers.a]\naccounts = [""]', 2, "neither"),
        ('[callers.a]\ncertificates = ["*.internal"]', 2, "DNS name"),
        ('[callers.a]\ncertificates = ["https://a.internal"]', 2, "spiffe"),
        ('[callers.a]\ncertificates = ["spiffe://Example.org/a"]', 2, "spiffe"),
        ('[callers.a]\ncertificates = [""]', 2, "DNS name"),
        (
            '[callers.a]\ncertificates = ["x"]\n[callers.b]\ncertificates = ["X"]',
            4,
            "already belongs to a",
        ),
        (f'[callers.a]\ncredentials = ["{CREDENTIAL}"]', 2, "never the credential itself"),
        ('[callers.a]\ncredentials = ["sha256:AB"]', 2, "64 hexadecimal"),
        (
            f'[callers.a]\ncredentials = ["{DIGEST_A}"]\n[callers.b]\ncredentials = ["{DIGEST_A}"]',
            4,
            "already belongs to a",
        ),
        (f'[callers.a]\nroles = ["{CREDENTIAL}"]', 2, "lkc_…"),
        (f"[callers.{CREDENTIAL}]\nrole = []", 2, "lkc_…"),
        ('[callers."a b"]\nroles = []', 1, "not a name"),
        ("callers = 1", 1, "tables"),
        ("[callers]\na = 1", 2, "[callers.a]"),
        ("\n[roles.verifier]\nmethods = []", 2, "built in"),
        ('[roles.x]\nmethods = ["/latchkey.v1.TokenService/Rename"]', 2, "unknown method"),
        ('[roles.x]\nmethods = ["/latchkey.v1.TokenService/*"]', 2, "unknown method"),
        # Texts for which tomllib raises Python's own errors.
        pytest.param("[callers.a]\nroles = [\n" + "[" * 1_000, 3, "nested too deeply", id="nested"),
        pytest.param("[callers.a]\nroles = [\n" + "9" * 5_000, 3, "too many digits", id="digits"),
        # Characters that end a line in Python but not in TOML.
        ('[callers.a]  # \u2028\x85\nroles = ["wizard"]', 2, "wizard"),
        ("[callers.a]  # \u2028\x85\nroles = [", 2, "value"),
    ],
)
def test_mistakes(text, line, reason):
    """The error names the line and what to do. It never shows what may be a credential."""
    with pytest.raises(PolicyError) as caught:
        parse(text)
    assert str(caught.value).startswith(f"line {line}: "), caught.value
    assert reason in str(caught.value)
    assert CREDENTIAL not in str(caught.value)


def test_deeply_nested_mistake():
    """The line is found even if Python's recursion limit is reached only during that search."""
    for deep in range(300, 700):
        with pytest.raises(PolicyError, match=r"line [12]: "):
            parse(f"wrong = {'[' * deep}{']' * deep}\nb.wrong = 1\n")


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
    """Parsing a large policy, and finding the line of a mistake in it, is quick."""
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
    with pytest.raises(PolicyError, match=r"^line 6002: callers\.last\.roles: "):
        parse(text + '[callers.last]\nroles = ["wizard"]\n')


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("rates = 5", "line 2: callers.a.rates: must be a table, such as"),
        ("rates = { nobody = 5 }", "line 2: callers.a.rates.nobody: unknown key 'nobody'; known:"),
        ("\n[callers.a.rates]\nmanager = 0", "line 4: callers.a.rates.manager: must be calls per"),
        ("rates = { manager = true }", "line 2: callers.a.rates.manager: must be calls per second"),
        ("rates = { manager = 1.5 }", "line 2: callers.a.rates.manager: must be calls per second"),
        ("watches = -1", "line 2: callers.a.watches: must be a number from 0 to"),
        ("watches = false", "line 2: callers.a.watches: must be a number from 0 to"),
        ('watches = "many"', "line 2: callers.a.watches: must be a number from 0 to"),
    ],
)
def test_invalid_limits(lines: str, message: str) -> None:
    """The error about an invalid limit has the line and the valid range."""
    with pytest.raises(PolicyError) as caught:
        parse(f"[callers.a]\n{lines}")
    assert message in str(caught.value)


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
