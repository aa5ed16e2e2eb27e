"""The console's settings: which ones are refused, and which host names they allow."""

import dataclasses
import pickle
from typing import Any

import pytest
from latchkey import Secret
from latchkey_console.settings import SettingsError, make

PROXY: dict[str, Any] = {"account_header": "X-User", "trusted_proxies": ("127.0.0.1",)}
OPENID: dict[str, Any] = {"oidc_issuer": "https://id.example.com", "oidc_client_id": "page"}
PUBLIC = {"public_url": "https://tokens.example.com"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "no way to identify visitors"),
        ({"account": "acme", **PROXY}, "exclude each other"),
        ({"account": "acme", **OPENID}, "exclude each other"),
        ({**PROXY, **OPENID}, "exclude each other"),
        ({"account": ""}, "1-128 characters"),
        ({"account": "me example"}, "1-128 characters"),
        ({"account": "acme", "listen": "0.0.0.0:80"}, "loopback only"),
        ({"account": "acme", "listen": "[::]:80"}, "loopback only"),
        ({"account": "acme", "listen": "192.0.2.1:80"}, "loopback only"),
        ({"account": "acme", "listen": "example.com:80"}, "loopback only"),
        ({"account": "acme", **PUBLIC}, "--public-url requires"),
        ({"account": "acme", "listen": "80"}, "HOST:PORT"),
        ({"account": "acme", "listen": "127.0.0.1:99999"}, "HOST:PORT"),
        ({"account": "acme", "trusted_proxies": ("127.0.0.1",)}, "requires --account-header"),
        ({"account_header": "X-User"}, "addresses that may send the header"),
        ({**PROXY, "trusted_proxies": ("proxy",)}, "address or network"),
        ({**PROXY, "trusted_proxies": ("10.1.2.3/8",)}, "address or network"),
        ({**PROXY, "trusted_proxies": ("0.0.0.0/0",)}, "trust everyone"),
        ({**PROXY, "trusted_proxies": ("::/0",)}, "trust everyone"),
        ({**PROXY, "account_header": "X User"}, "give a header name"),
        ({**PROXY, "listen": "0.0.0.0:80"}, "address that browsers use"),
        ({**PROXY, "public_url": "http://tokens.example.com"}, "unencrypted"),
        ({**PROXY, "public_url": "https://tokens.example.com/path"}, "scheme and host"),
        ({**PROXY, "public_url": "https://me@tokens.example.com"}, "scheme and host"),
        ({**PROXY, "public_url": "tokens.example.com"}, "scheme and host"),
        ({**PROXY, "public_url": "https://tokens.example.com:x"}, "scheme and host"),
        ({**PROXY, "public_url": "https://["}, "scheme and host"),
        ({**PROXY, "public_url": "https://a b"}, "a b is not a valid host"),
        ({**PROXY, "public_url": "https://a,b.example"}, "is not a valid host"),
        ({**PROXY, "public_url": "https://a..b"}, "is not a valid host"),
        ({**PROXY, "public_url": "https://a\u2100b"}, "scheme and host"),
        ({"oidc_issuer": "https://id.example.com"}, "--oidc-client-id"),
        ({**OPENID, "oidc_issuer": "http://id.example.com"}, "https"),
        ({**OPENID, "oidc_issuer": "id.example.com"}, "give the issuer URL"),
        ({**OPENID, "oidc_issuer": "https://["}, "give the issuer URL"),
        ({**OPENID, "oidc_issuer": "https://id.example.com:x"}, "give the issuer URL"),
        ({**OPENID, "oidc_claim": ""}, "give the claim"),
        ({"account": "acme", "product_name": " "}, "visible characters"),
        ({"account": "acme", "product_name": "x" * 65}, "visible characters"),
        ({"account": "acme", "product_name": "a\u202eb"}, "visible characters"),
        ({"account": "acme", "api_example_url": "api.example.com"}, "http or https URL"),
        ({"account": "acme", "api_example_url": "https://"}, "http or https URL"),
        ({"account": "acme", "api_example_url": "https://a/;rm"}, "http or https URL"),
        ({"account": "acme", "api_example_url": "https://a/$(x)"}, "http or https URL"),
        ({"account": "acme", "support_url": "javascript:alert(1)"}, "give a link"),
    ],
)
def test_unsafe_settings_are_refused(options: dict[str, Any], words: str) -> None:
    """Unsafe or incomplete settings are refused, and the error says what to do."""
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
        # Browsers omit the default port, including that of the address derived from --listen.
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
def test_accepted_host_names(options: dict[str, Any], public_url: str, hosts: set[str]) -> None:
    """The console accepts only its public host name, or on loopback every loopback name."""
    settings = make(**options)
    assert settings.public_url == public_url
    assert settings.hosts == hosts
    assert settings.https is public_url.startswith("https")


def test_public_client_has_no_secret() -> None:
    """An empty secret counts as unset: the client is a public client, protected by PKCE."""
    settings = make(**OPENID, oidc_client_secret="")
    assert settings.openid is not None
    assert settings.openid.client_secret is None


def test_the_clients_secret_stays_hidden() -> None:
    """Nothing that prints, inspects, copies or pickles settings shows the secret at the
    provider."""
    settings = make(**OPENID, oidc_client_secret="canary")
    assert settings.openid is not None
    assert settings.openid.client_secret == Secret("canary")
    for shown in (settings, dataclasses.asdict(settings), dataclasses.replace(settings, port=1)):
        assert "canary" not in repr(shown)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(settings)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"account": "a"}, "latchkey-console-50080"),
        ({"account": "a", "listen": "127.0.0.1:50081"}, "latchkey-console-50081"),
        ({**PROXY, **PUBLIC}, "__Host-latchkey-443"),
        ({**PROXY, "public_url": "https://tokens.example.com:8443"}, "__Host-latchkey-8443"),
    ],
)
def test_cookies_of_each_port(options: dict[str, Any], name: str) -> None:
    """Consoles on several ports of a host have different cookies, because browsers send each
    cookie to all ports."""
    assert make(**options).cookie_name == name
