"""What the page is told when it starts, checked: where it listens and how it knows who is looking.

Exactly one way to know that has to be chosen, and each is refused where it would let in others.
"""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final
from urllib.parse import SplitResult, urlsplit

__all__ = ["OpenIdSettings", "ProxySettings", "Settings", "SettingsError", "is_account_id", "make"]

LISTEN: Final = "127.0.0.1:50080"
TARGET: Final = "127.0.0.1:50051"
CLAIM: Final = "sub"

_ACCOUNT_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_HOST_NAME: Final = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?")
_HEADER_NAME: Final = re.compile(r"[A-Za-z0-9-]{1,64}")
_LISTEN: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})")

Network = IPv4Network | IPv6Network


class SettingsError(ValueError):
    """A setting is wrong. The message names it and says what to do."""


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """A sign-in proxy: the header that has the account, and who may send it."""

    header: str
    trusted: tuple[Network, ...]


@dataclass(frozen=True, slots=True)
class OpenIdSettings:
    """An OpenID Connect provider. Without `client_secret` this is a public client, with PKCE."""

    issuer: str
    client_id: str
    client_secret: str | None
    claim: str


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings. Exactly one of `account`, `proxy` and `openid` is set."""

    host: str
    port: int
    public_url: str
    """What the browser has in front of the path: scheme, host and port, without a slash."""
    target: str
    account: str | None = None
    proxy: ProxySettings | None = None
    openid: OpenIdSettings | None = None

    @property
    def hosts(self) -> frozenset[str]:
        """What a browser may call this server by. All else is DNS rebinding, or a wrong address."""
        parts = urlsplit(self.public_url)
        hosts = {parts.netloc.lower()}
        if _is_loopback(parts.hostname or ""):
            port = "" if parts.port is None else f":{parts.port}"
            hosts |= {f"{name}{port}" for name in ("127.0.0.1", "localhost", "[::1]")}
        return frozenset(hosts)

    @property
    def https(self) -> bool:
        """Whether browsers come over TLS, so that cookies may insist on it."""
        return self.public_url.startswith("https:")


def make(
    *,
    listen: str = LISTEN,
    public_url: str | None = None,
    target: str = TARGET,
    account: str | None = None,
    account_header: str | None = None,
    trusted_proxies: tuple[str, ...] = (),
    oidc_issuer: str | None = None,
    oidc_client_id: str | None = None,
    oidc_client_secret: str | None = None,
    oidc_claim: str = CLAIM,
) -> Settings:
    """Return the settings. Raises SettingsError."""
    host, port = _listen(listen)
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
        what = f"{' and '.join(chosen)} exclude each other" if chosen else "it is not said whose"
        raise SettingsError(
            f"{what}: give one of --account (to try it here), --account-header (behind a sign-in "
            "proxy) and --oidc-issuer (sign-in with OpenID Connect)"
        )
    if account is not None:
        if not is_account_id(account):
            raise SettingsError("--account: give 1-64 characters of A-Za-z0-9._:-")
        if not _is_loopback(host):
            raise SettingsError(
                f"--account lets everyone in who reaches {listen}: it works on loopback only, such "
                f"as --listen {LISTEN}. For others, use --account-header or --oidc-issuer"
            )
    if trusted_proxies and account_header is None:
        raise SettingsError("--trusted-proxy goes with --account-header")
    return Settings(
        host=host,
        port=port,
        public_url=_public_url(public_url, host, port, alone=account is not None),
        target=target,
        account=account,
        proxy=None if account_header is None else _proxy(account_header, trusted_proxies),
        openid=(
            None
            if oidc_issuer is None
            else _openid(oidc_issuer, oidc_client_id, oidc_client_secret, oidc_claim)
        ),
    )


def is_account_id(text: str) -> bool:
    """Tell whether `text` is an account id in the contract's sense."""
    return _ACCOUNT_ID.fullmatch(text) is not None


def _listen(value: str) -> tuple[str, int]:
    match = _LISTEN.fullmatch(value)
    if match is None or int(match[3]) > 65_535:
        raise SettingsError(f"--listen: give HOST:PORT, such as {LISTEN}")
    return match[1] or match[2], int(match[3])


def _public_url(value: str | None, host: str, port: int, *, alone: bool) -> str:
    if value is None:
        if not _is_loopback(host):
            raise SettingsError(
                "--public-url: say by which address browsers reach the page, such as "
                "https://tokens.example.com"
            )
        return _origin("http", host, port)
    parts = _split(value)
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
            "--public-url: give scheme and host, such as https://tokens.example.com"
        )
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise SettingsError(
            "--public-url: http is for loopback; elsewhere secrets would cross the network readable"
        )
    if alone and not _is_loopback(parts.hostname):
        raise SettingsError("--public-url goes with --account-header or --oidc-issuer")
    return _origin(parts.scheme, parts.hostname, parts.port)


def _origin(scheme: str, host: str, port: int | None) -> str:
    """Return what browsers have in front of the path, and send as Host."""
    shown = _as_browsers_have_it(host)
    # Browsers leave the usual port out.
    usual = 443 if scheme == "https" else 80
    return f"{scheme}://{shown}" + ("" if port in (None, usual) else f":{port}")


def _as_browsers_have_it(host: str) -> str:
    """Return a host in lower case, an address in its shortest form, a name in ASCII.

    Raises SettingsError for what is no host.
    """
    try:
        address = ip_address(host)
    except ValueError:
        pass
    else:
        return f"[{address.compressed}]" if address.version == 6 else address.compressed
    try:
        # Of IDNA only what browsers and this (RFC 3490) agree on for usual names.
        name = host.encode("idna").decode("ascii").lower()
    except UnicodeError:
        name = ""
    if not _HOST_NAME.fullmatch(name):
        raise SettingsError(f"--public-url: {host} is no host")
    return name


def _split(url: str) -> SplitResult | None:
    """Return a URL's parts, or None when it is none: brackets or a port that make no sense."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return parts


def _proxy(header: str, trusted: tuple[str, ...]) -> ProxySettings:
    if not _HEADER_NAME.fullmatch(header):
        raise SettingsError("--account-header: give a header's name, such as X-Forwarded-User")
    if not trusted:
        raise SettingsError(
            "--trusted-proxy: say from which addresses the header comes, such as 127.0.0.1; "
            "from anywhere else it is worth nothing"
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
            raise SettingsError(f"--trusted-proxy {text}: that trusts everyone")
        networks.append(network)
    return ProxySettings(header.lower(), tuple(networks))


def _openid(issuer: str, client_id: str | None, secret: str | None, claim: str) -> OpenIdSettings:
    parts = _split(issuer)
    if (
        parts is None
        or parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.query
        or parts.fragment
    ):
        raise SettingsError("--oidc-issuer: give the provider's address, as its discovery names it")
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise SettingsError("--oidc-issuer: has to be https, but on loopback")
    if not client_id:
        raise SettingsError("--oidc-client-id: say what the provider calls this page")
    if not claim:
        raise SettingsError(f"--oidc-claim: say which claim has the account, such as {CLAIM}")
    return OpenIdSettings(issuer, client_id, secret or None, claim)


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        address: IPv4Address | IPv6Address = ip_address(host)
    except ValueError:
        return False
    return address.is_loopback
