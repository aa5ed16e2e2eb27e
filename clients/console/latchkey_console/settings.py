"""The console's validated settings: where it listens and how it identifies visitors.

Exactly one way to identify visitors must be chosen. Each way is refused where it would let
strangers in.
"""

import re
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from latchkey import Secret
from latchkey_coherence.identifiers import ACCOUNT_ID

from latchkey_console import embedding, groups
from latchkey_console.appearance import Logo, read_logo, read_theme
from latchkey_console.embedding import Embedding, Peer
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
GROUPS_CLAIM: Final = "groups"
PRODUCT: Final = "Latchkey"
PRODUCT_LENGTH_MAX: Final = 64
API_URL: Final = "https://api.example.com/"

_HEADER_NAME: Final = re.compile(r"[A-Za-z0-9-]{1,64}")
_EXAMPLE_URL: Final = re.compile(r"https?://[A-Za-z0-9._~:/\[\]-]{1,200}")
_LISTEN: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})")


Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """A sign-in proxy: the header that holds the account, and the networks that may send it.

    If accounts belong to several people, `person_header` holds the visitor's own name.
    """

    header: str
    trusted: tuple[Network, ...]
    person_header: str | None = None
    several: bool = False
    """Whether `header` holds all accounts of a visitor, separated by commas."""
    operators: frozenset[str] = frozenset()
    """If not empty, `header` holds groups, and only people in one of these may enter."""


@dataclass(frozen=True, slots=True)
class OpenIdSettings:
    """An OpenID Connect provider. Without `client_secret`, this is a public client with PKCE."""

    issuer: str
    client_id: str
    client_secret: Secret | None
    claim: str
    accounts_claim: str | None = None
    """The claim with all accounts of a visitor, in place of `claim`."""
    accounts_key: str | None = None
    """If that claim is a list of objects: their key with the account."""
    groups_claim: str = GROUPS_CLAIM
    operators: frozenset[str] = frozenset()
    """If not empty, only people with one of these in `groups_claim` may enter."""

    @property
    def needs_only_the_subject(self) -> bool:
        """Whether the claim `sub` suffices, which every ID token has."""
        return self.claim == CLAIM and self.accounts_claim is None and not self.operators


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
    embedding: Embedding = field(default_factory=Embedding)
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
    def is_for_operators(self) -> bool:
        """Whether to serve the operators' view in place of the API Tokens page."""
        return any(way is not None and way.operators for way in (self.proxy, self.openid))

    @property
    def has_accounts(self) -> bool:
        """Whether visitors may have several accounts."""
        several = self.proxy is not None and self.proxy.several
        return several or (self.openid is not None and self.openid.accounts_claim is not None)

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
    accounts_header: str | None = None,
    groups_header: str | None = None,
    person_header: str | None = None,
    trusted_proxies: tuple[str, ...] = (),
    oidc_issuer: str | None = None,
    oidc_client_id: str | None = None,
    oidc_client_secret: str | None = None,
    oidc_claim: str = CLAIM,
    oidc_accounts_claim: str | None = None,
    oidc_accounts_key: str | None = None,
    oidc_groups_claim: str = GROUPS_CLAIM,
    operator_groups: tuple[str, ...] = (),
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
            ("--accounts-header", accounts_header),
            ("--groups-header", groups_header),
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
            f"{what}: give exactly one of --account (to try it here), --account-header or "
            "--accounts-header (behind a sign-in proxy) and --oidc-issuer (to sign in with OpenID "
            "Connect)"
        )
    if account is not None:
        if not is_account_id(account):
            raise SettingsError("--account: give 1-128 characters of A-Za-z0-9._:@|+=/~-")
        if not is_loopback(host):
            raise SettingsError(
                f"--account lets in everyone who can reach {listen}, so it works on loopback only, "
                f"such as --listen {LISTEN}. Elsewhere, use --account-header or --oidc-issuer"
            )
    if peers and state_key_file is None:
        raise SettingsError("--peer requires --state-key-file, which all processes share")
    headers = (account_header, accounts_header, groups_header)
    sent_in = next((name for name in headers if name is not None), None)
    has_account = oidc_accounts_claim is not None or oidc_claim != CLAIM
    try:
        operators = groups.checked(operator_groups, chosen[0], has_account=has_account)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    if trusted_proxies and sent_in is None:
        raise SettingsError("--trusted-proxy requires --account-header or --accounts-header")
    if person_header is not None and sent_in is None:
        raise SettingsError("--person-header requires --account-header or --accounts-header")
    if sent_in is not None and account_header is None and person_header is None:
        raise SettingsError(f"{chosen[0]} requires --person-header: the audit log names the person")
    if oidc_issuer is None and oidc_accounts_claim is not None:
        raise SettingsError("--oidc-accounts-claim requires --oidc-issuer")
    if oidc_accounts_key is not None and oidc_accounts_claim is None:
        raise SettingsError("--oidc-accounts-key requires --oidc-accounts-claim")
    if oidc_accounts_claim is not None and oidc_claim != CLAIM:
        raise SettingsError("--oidc-claim and --oidc-accounts-claim exclude each other")
    return Settings(
        host=host,
        port=port,
        public_url=_public_url(public_url, host, port, alone=account is not None),
        target=target,
        account=account,
        proxy=(
            None
            if sent_in is None
            else _proxy(chosen[0], sent_in, person_header, trusted_proxies, operators)
        ),
        openid=(
            None
            if oidc_issuer is None
            else replace(
                _openid(oidc_issuer, oidc_client_id, oidc_client_secret, oidc_claim),
                accounts_claim=_claim("--oidc-accounts-claim", oidc_accounts_claim),
                accounts_key=_claim("--oidc-accounts-key", oidc_accounts_key),
                groups_claim=_claim("--oidc-groups-claim", oidc_groups_claim) or GROUPS_CLAIM,
                operators=operators,
            )
        ),
        brand=replace(
            _brand(product_name, api_example_url, support_url),
            logo=embedding.from_file("--logo", read_logo, logo),
            theme=embedding.from_file("--theme-css", read_theme, theme_css),
        ),
        embedding=Embedding(
            embedding.base_path(base_path),
            header,
            tuple(map(embedding.frame_ancestor, frame_ancestors)),
        ),
        state_keys=embedding.from_file("--state-key-file", read_keys, state_key_file) or (),
        peers=tuple(map(embedding.peer, peers)),
    )


def is_account_id(text: str) -> bool:
    """Return whether `text` is an account id as the contract defines it."""
    return ACCOUNT_ID.fullmatch(text) is not None


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


def _claim(option: str, name: str | None) -> str | None:
    if name == "":
        raise SettingsError(f"{option}: give a name, such as accounts")
    return name


def _proxy(
    option: str,
    header: str,
    person_header: str | None,
    trusted: tuple[str, ...],
    operators: frozenset[str],
) -> ProxySettings:
    if not _HEADER_NAME.fullmatch(header):
        example = "X-Forwarded-" + ("User" if option == "--account-header" else "Groups")
        raise SettingsError(f"{option}: give a header name, such as {example}")
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
        option == "--accounts-header",
        operators,
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
