"""Settings of the page: what is refused, and why that is right."""

from typing import Any

import pytest
from latchkey_console.settings import SettingsError, make

PROXY: dict[str, Any] = {"account_header": "X-User", "trusted_proxies": ("127.0.0.1",)}
OPENID: dict[str, Any] = {"oidc_issuer": "https://id.example.com", "oidc_client_id": "page"}
PUBLIC = {"public_url": "https://tokens.example.com"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "not said whose"),
        ({"account": "acme", **PROXY}, "exclude each other"),
        ({"account": "acme", **OPENID}, "exclude each other"),
        ({**PROXY, **OPENID}, "exclude each other"),
        ({"account": ""}, "1-64 characters"),
        ({"account": "me@example.com"}, "1-64 characters"),
        ({"account": "acme", "listen": "0.0.0.0:80"}, "loopback only"),
        ({"account": "acme", "listen": "[::]:80"}, "loopback only"),
        ({"account": "acme", "listen": "192.0.2.1:80"}, "loopback only"),
        ({"account": "acme", "listen": "example.com:80"}, "loopback only"),
        ({"account": "acme", **PUBLIC}, "--public-url goes with"),
        ({"account": "acme", "listen": "80"}, "HOST:PORT"),
        ({"account": "acme", "listen": "127.0.0.1:99999"}, "HOST:PORT"),
        ({"account": "acme", "trusted_proxies": ("127.0.0.1",)}, "goes with --account-header"),
        ({"account_header": "X-User"}, "worth nothing"),
        ({**PROXY, "trusted_proxies": ("proxy",)}, "address or network"),
        ({**PROXY, "trusted_proxies": ("10.1.2.3/8",)}, "address or network"),
        ({**PROXY, "trusted_proxies": ("0.0.0.0/0",)}, "trusts everyone"),
        ({**PROXY, "trusted_proxies": ("::/0",)}, "trusts everyone"),
        ({**PROXY, "account_header": "X User"}, "header's name"),
        ({**PROXY, "listen": "0.0.0.0:80"}, "say by which address"),
        ({**PROXY, "public_url": "http://tokens.example.com"}, "readable"),
        ({**PROXY, "public_url": "https://tokens.example.com/path"}, "scheme and host"),
        ({**PROXY, "public_url": "https://me@tokens.example.com"}, "scheme and host"),
        ({**PROXY, "public_url": "tokens.example.com"}, "scheme and host"),
        ({**PROXY, "public_url": "https://tokens.example.com:x"}, "scheme and host"),
        ({**PROXY, "public_url": "https://["}, "scheme and host"),
        ({**PROXY, "public_url": "https://a b"}, "a b is no host"),
        ({**PROXY, "public_url": "https://a,b.example"}, "is no host"),
        ({**PROXY, "public_url": "https://a..b"}, "is no host"),
        ({**PROXY, "public_url": "https://a\u2100b"}, "scheme and host"),
        ({"oidc_issuer": "https://id.example.com"}, "--oidc-client-id"),
        ({**OPENID, "oidc_issuer": "http://id.example.com"}, "https"),
        ({**OPENID, "oidc_issuer": "id.example.com"}, "provider's address"),
        ({**OPENID, "oidc_issuer": "https://["}, "provider's address"),
        ({**OPENID, "oidc_issuer": "https://id.example.com:x"}, "provider's address"),
        ({**OPENID, "oidc_claim": ""}, "which claim"),
    ],
)
def test_what_would_let_in_others_is_refused(options: dict[str, Any], words: str) -> None:
    """A setting that lets in others, or says nothing, does not start, and says what to do."""
    with pytest.raises(SettingsError, match=r".+") as refusal:
        make(**options)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "public_url", "hosts"),
    [
        (
            {"account": "acme"},
            "http://127.0.0.1:50080",
            {"127.0.0.1:50080", "localhost:50080", "[::1]:50080"},
        ),
        (
            {"account": "acme", "listen": "[::1]:81"},
            "http://[::1]:81",
            {"127.0.0.1:81", "localhost:81", "[::1]:81"},
        ),
        # Browsers leave the usual port out, also of the address that is made of --listen.
        (
            {"account": "acme", "listen": "127.0.0.1:80"},
            "http://127.0.0.1",
            {"127.0.0.1", "localhost", "[::1]"},
        ),
        (
            {"account": "acme", "listen": "[::1]:80"},
            "http://[::1]",
            {"127.0.0.1", "localhost", "[::1]"},
        ),
        (
            {"account": "acme", "listen": "127.0.0.1:443"},
            "http://127.0.0.1:443",
            {"127.0.0.1:443", "localhost:443", "[::1]:443"},
        ),
        (
            {"account": "acme", "public_url": "http://LOCALHOST:80/"},
            "http://localhost",
            {"127.0.0.1", "localhost", "[::1]"},
        ),
        (
            {**OPENID, "public_url": "https://[2001:DB8::1]:0443"},
            "https://[2001:db8::1]",
            {"[2001:db8::1]"},
        ),
        (
            {**OPENID, "public_url": "https://[2001:0DB8:0:0::1]"},
            "https://[2001:db8::1]",
            {"[2001:db8::1]"},
        ),
        (
            {**OPENID, "public_url": "https://TÖKENS.example"},
            "https://xn--tkens-jua.example",
            {"xn--tkens-jua.example"},
        ),
        (
            {**PROXY, **PUBLIC, "listen": "0.0.0.0:80"},
            "https://tokens.example.com",
            {"tokens.example.com"},
        ),
        (
            {**OPENID, "public_url": "https://tokens.example.com:443"},
            "https://tokens.example.com",
            {"tokens.example.com"},
        ),
        (
            {**OPENID, "public_url": "https://Tokens.example.com:8443/"},
            "https://tokens.example.com:8443",
            {"tokens.example.com:8443"},
        ),
    ],
)
def test_names_that_browsers_may_use(
    options: dict[str, Any], public_url: str, hosts: set[str]
) -> None:
    """The page is served under its public name alone, and on loopback under all of those."""
    settings = make(**options)
    assert settings.public_url == public_url
    assert settings.hosts == hosts
    assert settings.https is public_url.startswith("https")


def test_public_client_has_no_secret() -> None:
    """An empty secret is none: the client is a public one, protected by PKCE."""
    settings = make(**OPENID, oidc_client_secret="")
    assert settings.openid is not None
    assert settings.openid.client_secret is None
