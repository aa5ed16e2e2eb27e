"""Which accounts a sign-in names, and which one a request is about."""

import pytest
from latchkey_console import settings
from latchkey_console.accounts import ACCOUNTS_MAX, NotChosen, accounts_of, choose, listed
from latchkey_console.identity import Refused, Viewer

MANY = [f"a{number}" for number in range(ACCOUNTS_MAX)]


@pytest.mark.parametrize(
    ("claim", "key", "accounts"),
    [
        (["acme"], None, ("acme",)),
        (["acme", "org/42", "acme"], None, ("acme", "org/42")),
        ([{"id": "acme", "name": "Acme Inc."}, {"id": "b"}], "id", ("acme", "b")),
        (MANY, None, tuple(MANY)),
    ],
)
def test_claims(claim: object, key: str | None, accounts: tuple[str, ...]) -> None:
    """A claim lists accounts as texts, or as objects with a key. Each counts once."""
    assert accounts_of(claim, key) == accounts


@pytest.mark.parametrize(
    ("claim", "key", "title"),
    [
        ([], None, "You do not have an account"),
        ([], "id", "You do not have an account"),
        ([*MANY, "more"], None, "You have too many accounts"),
        ("acme", None, "Invalid account ID"),
        ({"acme": {}}, None, "Invalid account ID"),
        (None, None, "Invalid account ID"),
        (["acme", "Acme Inc."], None, "Invalid account ID"),
        (["acme", ""], None, "Invalid account ID"),
        (["acme", 5], None, "Invalid account ID"),
        (["acme", None], None, "Invalid account ID"),
        ([{"id": "acme"}], None, "Invalid account ID"),
        (["acme"], "id", "Invalid account ID"),
        ([{"id": "acme"}, {"name": "b"}], "id", "Invalid account ID"),
        ([{"id": ["acme"]}], "id", "Invalid account ID"),
    ],
)
def test_bad_claims_are_refused(claim: object, key: str | None, title: str) -> None:
    """No account, too many, or one that is invalid refuses the whole sign-in."""
    with pytest.raises(Refused) as refused:
        accounts_of(claim, key)
    assert (refused.value.status, refused.value.title) == (403, title)
    assert "Acme Inc." not in refused.value.text


@pytest.mark.parametrize(
    ("header", "accounts"),
    [("acme", ("acme",)), ("acme,b", ("acme", "b")), (" acme ,\tb , acme", ("acme", "b"))],
)
def test_headers(header: str, accounts: tuple[str, ...]) -> None:
    """A header lists accounts with commas between them."""
    assert listed(header) == accounts


@pytest.mark.parametrize(
    "header", ["", " ", "acme,", "acme,,b", "acme;b c", ",".join([*MANY, "x"])]
)
def test_bad_headers_are_refused(header: str) -> None:
    """An empty list, an empty part, an invalid id, or too many accounts are refused."""
    with pytest.raises(Refused):
        listed(header)


def test_a_request_is_about_one_account() -> None:
    """A request is about the account that it names, if that is one of the visitor's. Nothing else
    decides between several accounts."""
    several = Viewer("", accounts=("acme", "b"))
    chosen = choose(several, "b")
    assert (chosen.account_id, chosen.in_url, chosen.query) == ("b", "b", "?account=b")
    with pytest.raises(NotChosen):
        choose(several, "")
    with pytest.raises(Refused):
        choose(several, "globex")
    single = Viewer("", accounts=("acme",))
    assert choose(single, "").account_id == "acme"
    with pytest.raises(Refused):
        choose(single, "b")
    fixed = Viewer("acme")
    assert choose(fixed, "b") is fixed
    assert fixed.query == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"account_header": "X-A", "accounts_header": "X-B"}, "exclude each other"),
        ({"accounts_header": "X-A", "trusted_proxies": ("127.0.0.1",)}, "--person-header"),
        ({"accounts_header": "X A", "person_header": "X-P"}, "--accounts-header"),
        ({"accounts_header": "X-A", "person_header": "X-P"}, "--trusted-proxy"),
        ({"account": "acme", "oidc_accounts_claim": "orgs"}, "requires --oidc-issuer"),
        ({"account": "acme", "oidc_accounts_key": "id"}, "requires --oidc-accounts-claim"),
        ({"oidc_accounts_claim": "orgs", "oidc_claim": "tenant"}, "exclude each other"),
        ({"oidc_accounts_claim": ""}, "give a name"),
        ({"oidc_accounts_claim": "orgs", "oidc_accounts_key": ""}, "give a name"),
    ],
)
def test_bad_settings(options: dict[str, object], message: str) -> None:
    """Settings that contradict each other, or leave out who acts, are refused."""
    values: dict[str, object] = dict(options)
    if "oidc_accounts_claim" in options and "account" not in options:
        values |= {"oidc_issuer": "https://id.example.com", "oidc_client_id": "page"}
    with pytest.raises(settings.SettingsError, match=message):
        settings.make(**values)  # type: ignore[arg-type]  # from the table above
