"""The console's validated settings: where it listens and how it identifies visitors.

Exactly one way to identify visitors must be chosen. Each way is refused where it would let
strangers in.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit

from latchkey import Secret

from latchkey_console.appearance import Logo, read_logo, read_theme
from latchkey_console.state import read_keys
from latchkey_console.urls import SettingsError, https_or_loopback, is_loopback, origin, split

__all__ = [
    "Brand",
    "Embedding",
    "OpenIdSettings",
    "Peer",
    "ProxySettings",
    "Settings",
    "SettingsError",
    "https_or_loopback",
    "is_account_id",
    "listening_address",
    "make",
]

LISTEN: Final = "127.0.0.1:50080"
TARGET: Final = "127.0.0.1:50051"
CLAIM: Final = "sub"
PRODUCT: Final = "Latchkey"
PRODUCT_LENGTH_MAX: Final = 64
API_URL: Final = "https://api.example.com/"

# As the contract defines it (`account_id` in token_service.proto).
_ACCOUNT_ID: Final = re.compile(r"[A-Za-z0-9._:@|+=/~-]{1,128}")
_HEADER_NAME: Final = re.compile(r"[A-Za-z0-9-]{1,64}")
_EXAMPLE_URL: Final = re.compile(r"https?://[A-Za-z0-9._~:/\[\]-]{1,200}")
_LISTEN: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})")

_BASE_PATH: Final = re.compile(r"(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+")
BASE_PATH_LENGTH_MAX: Final = 200

Network = IPv4Network | IPv6Network
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """A sign-in proxy: the header that holds the account, and the networks that may send it.

    If accounts belong to several people, `person_header` holds the visitor's own name.
    """

    header: str
    trusted: tuple[Network, ...]
    person_header: str | None = None


@dataclass(frozen=True, slots=True)
class OpenIdSettings:
    """An OpenID Connect provider. Without `client_secret`, this is a public client with PKCE."""

    issuer: str
    client_id: str
    client_secret: Secret | None
    claim: str


@dataclass(frozen=True, slots=True)
class Peer:
    """Another process of this console, or a name with the addresses of several."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Brand:
    """What the page says about the platform whose tokens it manages."""

    product: str = PRODUCT
    """The name in the header and in titles."""
    api_url: str = API_URL
    """The address of the platform's API in the examples."""
    support_url: str | None = None
    """Where the link "Get help" leads. Without it there is no link."""
    logo: Logo | None = None
    """The picture in the header, in place of Latchkey's icon."""
    theme: str | None = None
    """A style sheet with the colours, fonts and corners of the product."""

    @property
    def icon(self) -> bool:
        """Whether to show a picture in the header. Another product does not want Latchkey's."""
        return self.logo is not None or self.product == PRODUCT

    @property
    def api_host(self) -> str:
        """The API's host and port, as gRPC tools expect them."""
        parts = urlsplit(self.api_url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        host = parts.hostname or ""
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True, slots=True)
class Embedding:
    """The page's place in a product."""

    base_path: str = ""
    """The path below which the page is served, such as /settings/tokens. Empty: at the root."""
    header: bool = True
    """Whether the page has its own header."""
    frame_ancestors: tuple[str, ...] = ()
    """The origins whose pages may frame this page."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings. Exactly one of `account`, `proxy` and `openid` is set."""

    host: str
    port: int
    public_url: str
    """The origin that browsers use: scheme, host and port, without a trailing slash."""
    target: str
    account: str | None = None
    proxy: ProxySettings | None = None
    openid: OpenIdSettings | None = None
    brand: Brand = Brand()
    embedding: Embedding = Embedding()
    state_keys: tuple[bytes, ...] = field(default=(), repr=False)
    """The keys that the console's processes share. Empty: this is the only process."""
    peers: tuple[Peer, ...] = ()
    """Where the other processes listen."""

    @property
    def home_url(self) -> str:
        """The URL of the page, without a trailing slash."""
        return f"{self.public_url}{self.embedding.base_path}"

    @property
    def hosts(self) -> frozenset[str]:
        """The Host values to accept. Any other is DNS rebinding or a wrong address."""
        parts = urlsplit(self.public_url)
        hosts = {parts.netloc.lower()}
        if is_loopback(parts.hostname or ""):
            port = "" if parts.port is None else f":{parts.port}"
            hosts |= {f"{name}{port}" for name in ("127.0.0.1", "localhost", "[::1]")}
        return frozenset(hosts)

    @property
    def cookie_name(self) -> str:
        """The name of the session's cookie, which is different for each port.

        Browsers send cookies to all ports of a host (RFC 6265 §8.5). Two consoles on one host would
        otherwise end each other's sessions.
        """
        port = urlsplit(self.public_url).port or (443 if self.https else 80)
        # The prefix stops other hosts of the domain from setting this cookie (RFC 6265bis §4.1.3).
        if not self.https:
            return f"latchkey-console-{port}"
        # It allows no other path than /. The other prefix stops only plain http.
        prefix = "__Secure-" if self.embedding.base_path else "__Host-"
        return f"{prefix}latchkey-{port}"

    @property
    def https(self) -> bool:
        """Whether browsers connect over TLS, so that cookies can require it."""
        return self.public_url.startswith("https:")


def make(
    *,
    listen: str = LISTEN,
    public_url: str | None = None,
    target: str = TARGET,
    account: str | None = None,
    account_header: str | None = None,
    person_header: str | None = None,
    trusted_proxies: tuple[str, ...] = (),
    oidc_issuer: str | None = None,
    oidc_client_id: str | None = None,
    oidc_client_secret: str | None = None,
    oidc_claim: str = CLAIM,
    product_name: str = PRODUCT,
    api_example_url: str = API_URL,
    support_url: str | None = None,
    logo: Path | None = None,
    theme_css: Path | None = None,
    base_path: str = "",
    header: bool = True,
    frame_ancestors: tuple[str, ...] = (),
    state_key_file: Path | None = None,
    peers: tuple[str, ...] = (),
) -> Settings:
    """Return the settings. Raises SettingsError."""
    host, port = listening_address(listen, LISTEN)
    chosen = [
        name
        for name, value in (
            ("--account", account),
            ("--account-header", account_header),
            ("--oidc-issuer", oidc_issuer),
        )
        if value is not None
    ]
    if len(chosen) != 1:
        what = (
            f"{' and '.join(chosen)} exclude each other"
            if chosen
            else "no way to identify visitors"
        )
        raise SettingsError(
            f"{what}: give exactly one of --account (to try it here), --account-header (behind a "
            "sign-in proxy) and --oidc-issuer (to sign in with OpenID Connect)"
        )
    if account is not None:
        if not is_account_id(account):
            raise SettingsError("--account: give 1-128 characters of A-Za-z0-9._:@|+=/~-")
        if not is_loopback(host):
            raise SettingsError(
                f"--account lets in everyone who can reach {listen}, so it works on loopback only, "
                f"such as --listen {LISTEN}. Elsewhere, use --account-header or --oidc-issuer"
            )
    if trusted_proxies and account_header is None:
        raise SettingsError("--trusted-proxy requires --account-header")
    if person_header is not None and account_header is None:
        raise SettingsError("--person-header requires --account-header")
    if peers and state_key_file is None:
        raise SettingsError("--peer requires --state-key-file, which all processes share")
    return Settings(
        host=host,
        port=port,
        public_url=_public_url(public_url, host, port, alone=account is not None),
        target=target,
        account=account,
        proxy=(
            None
            if account_header is None
            else _proxy(account_header, person_header, trusted_proxies)
        ),
        openid=(
            None
            if oidc_issuer is None
            else _openid(oidc_issuer, oidc_client_id, oidc_client_secret, oidc_claim)
        ),
        brand=replace(
            _brand(product_name, api_example_url, support_url),
            logo=_from_file("--logo", read_logo, logo),
            theme=_from_file("--theme-css", read_theme, theme_css),
        ),
        embedding=Embedding(
            _base_path(base_path), header, tuple(map(_frame_ancestor, frame_ancestors))
        ),
        state_keys=_from_file("--state-key-file", read_keys, state_key_file) or (),
        peers=tuple(map(_peer, peers)),
    )


def is_account_id(text: str) -> bool:
    """Return whether `text` is an account id as the contract defines it."""
    return _ACCOUNT_ID.fullmatch(text) is not None


def listening_address(value: str, example: str) -> tuple[str, int]:
    """Return host and port of `--listen`. Raises SettingsError."""
    match = _LISTEN.fullmatch(value)
    if match is None or int(match[3]) > 65_535:
        raise SettingsError(f"--listen: give HOST:PORT, such as {example}")
    return match[1] or match[2], int(match[3])


def _public_url(value: str | None, host: str, port: int, *, alone: bool) -> str:
    if value is None:
        if not is_loopback(host):
            raise SettingsError(
                "--public-url: give the address that browsers use, such as "
                "https://tokens.example.com"
            )
        return origin("http", host, port)
    parts = split(value)
    if (
        parts is None
        or parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.port == 0
        or parts.path not in ("", "/")
        or parts.query
        or parts.fragment
        or "@" in parts.netloc
    ):
        raise SettingsError(
            "--public-url: give only scheme and host, such as https://tokens.example.com"
        )
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        raise SettingsError(
            "--public-url: use https; plain http is allowed on loopback only, because it would "
            "send secrets over the network unencrypted"
        )
    if alone and not is_loopback(parts.hostname):
        raise SettingsError("--public-url requires --account-header or --oidc-issuer")
    return origin(parts.scheme, parts.hostname, parts.port)


def _proxy(header: str, person_header: str | None, trusted: tuple[str, ...]) -> ProxySettings:
    if not _HEADER_NAME.fullmatch(header):
        raise SettingsError("--account-header: give a header name, such as X-Forwarded-User")
    if person_header is not None and not _HEADER_NAME.fullmatch(person_header):
        raise SettingsError("--person-header: give a header name, such as X-Forwarded-Email")
    if not trusted:
        raise SettingsError(
            "--trusted-proxy: give the addresses that may send the header, such as 127.0.0.1; "
            "requests from anywhere else are refused"
        )
    networks = []
    for text in trusted:
        try:
            network = ip_network(text)
        except ValueError:
            raise SettingsError(
                f"--trusted-proxy {text}: give an address or network, such as 10.1.2.3 or "
                "10.1.0.0/16"
            ) from None
        if network.prefixlen == 0:
            raise SettingsError(f"--trusted-proxy {text}: this would trust everyone")
        networks.append(network)
    return ProxySettings(
        header.lower(),
        tuple(networks),
        None if person_header is None else person_header.lower(),
    )


def _openid(issuer: str, client_id: str | None, secret: str | None, claim: str) -> OpenIdSettings:
    parts = split(issuer)
    if (
        parts is None
        or parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.query
        or parts.fragment
    ):
        raise SettingsError("--oidc-issuer: give the issuer URL from the provider's discovery")
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        raise SettingsError("--oidc-issuer: must use https, except on loopback")
    if not client_id:
        raise SettingsError("--oidc-client-id: give this page's client ID at the provider")
    if not claim:
        raise SettingsError(f"--oidc-claim: give the claim that holds the account, such as {CLAIM}")
    return OpenIdSettings(issuer, client_id, Secret(secret) if secret else None, claim)


def _brand(product: str, api_url: str, support_url: str | None) -> Brand:
    product = product.strip()
    if not 1 <= len(product) <= PRODUCT_LENGTH_MAX or not product.isprintable():
        raise SettingsError(f"--product-name: give 1-{PRODUCT_LENGTH_MAX} visible characters")
    # It appears in a command that people paste into a shell.
    parts = split(api_url)
    if _EXAMPLE_URL.fullmatch(api_url) is None or parts is None or not parts.hostname:
        raise SettingsError(f"--api-example-url: give an http or https URL, such as {API_URL}")
    if support_url is not None and not support_url.startswith(("https://", "http://", "mailto:")):
        raise SettingsError(
            "--support-url: give a link such as https://example.com/help or mailto:help@example.com"
        )
    return Brand(product, api_url, support_url)


def _base_path(value: str) -> str:
    path = value.rstrip("/")
    if path and (len(path) > BASE_PATH_LENGTH_MAX or _BASE_PATH.fullmatch(path) is None):
        raise SettingsError("--base-path: give a plain path, such as /settings/tokens")
    return path


def _frame_ancestor(value: str) -> str:
    parts = split(value)
    if parts is None or not https_or_loopback(value) or parts.path not in ("", "/") or parts.query:
        raise SettingsError(
            f"--frame-ancestor {value}: give the origin of the page that frames this one, such as "
            "https://app.example.com"
        )
    return origin(parts.scheme, parts.hostname or "", parts.port)


def _peer(value: str) -> Peer:
    match = _LISTEN.fullmatch(value)
    if match is None or not 1 <= int(match[3]) <= 65_535:
        raise SettingsError(f"--peer {value}: give HOST:PORT, such as console-2.internal:50080")
    return Peer(match[1] or match[2], int(match[3]))


def _from_file(option: str, read: Callable[[Path], T], path: Path | None) -> T | None:
    try:
        return None if path is None else read(path)
    except ValueError as error:
        raise SettingsError(f"{option}: {error}") from None
