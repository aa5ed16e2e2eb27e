"""Settings: environment variables with the prefix LATCHKEY_, or the same names in a .env file.

Owns the names, defaults and valid values. `loading.py` reads them, and `exposure.py` checks
combinations.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Literal, NoReturn

from latchkey_coherence.lease import LEASE_SECONDS_MAX
from pydantic import AfterValidator, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from latchkey_service.lifetime import Lifetime, duration_in
from latchkey_service.secret_format import IMPORTED_PREFIX
from latchkey_service.settings import database_url, webhook
from latchkey_service.settings.data_dir import default_data_dir

__all__ = ["ENV_FILE", "PREFIX", "Settings"]

PREFIX = "LATCHKEY_"
ENV_FILE = ".env"


def _listen(value: str) -> str:
    """Accept HOST:PORT, [IPv6]:PORT and unix:PATH."""
    if value.startswith("unix:"):
        path = value.removeprefix("unix:").removeprefix("//")
        # sun_path holds 108 bytes, including the final NUL.
        if not 0 < len(os.fsencode(path)) < 108:
            raise ValueError("the path of a UNIX socket must have 1-107 bytes")
        return "unix:" + str(Path(path).absolute())
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.%\w]+\]|[^:\s\[\]]+):(\d{1,5})", value)
    if match is None or int(match[2]) > 65535:
        raise ValueError("must be HOST:PORT, such as 127.0.0.1:50051, or unix:PATH")
    return value


# In the class below, `database_url` is the setting.
_database_url = database_url.valid


def _imported_prefixes(value: str) -> str:
    prefixes = [prefix.strip() for prefix in value.split(",")]
    if not all(prefix == "*" or IMPORTED_PREFIX.fullmatch(prefix) for prefix in prefixes):
        raise ValueError("must be prefixes of 1-32 characters of A-Za-z0-9._~+/=-, or *")
    return ",".join(prefixes)


def _duration(value: str) -> str:
    duration_in(value)
    return value


class Settings(BaseSettings):
    """All settings. `latchkey config` and docs/settings.md show the descriptions."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=ENV_FILE,
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    listen: Annotated[str, AfterValidator(_listen)] = Field(
        "127.0.0.1:50051", description="plaintext address: HOST:PORT or unix:PATH"
    )
    tls_listen: Annotated[str, AfterValidator(_listen)] | None = Field(
        None, description="TLS 1.3 address, in addition to LISTEN: HOST:PORT"
    )
    tls_certificate: Path | None = Field(
        None, description="PEM file with the server's certificate and its intermediate certificates"
    )
    tls_key: Path | None = Field(None, description="PEM file with the certificate's private key")
    tls_client_ca: Path | None = Field(
        None,
        description="PEM file with the CAs of client certificates; TLS_LISTEN then requires one",
    )
    policy: Path | None = Field(
        None, description="policy file: who may call; unset: everyone, from this machine only"
    )
    trusted_proxy: str | None = Field(
        None,
        pattern=r"^[A-Za-z][A-Za-z0-9+.-]*://[^\s,;=\"]+$",
        description="URI in the certificate of the proxy whose x-forwarded-client-cert is trusted",
    )
    insecure_listen: Literal["none", "plaintext", "anonymous"] = Field(
        "none",
        description="allows LISTEN on addresses that other machines can reach: plaintext with a "
        "policy, anonymous without one",
    )
    reflection: Literal["auto", "on", "off"] = Field(
        "auto",
        description="gRPC reflection: on, off or auto; auto: on loopback addresses and UNIX "
        "sockets, but not behind a proxy",
    )
    metrics_listen: Annotated[str, AfterValidator(_listen)] | None = Field(
        None, description="address of the metrics for Prometheus, for everyone: HOST:PORT"
    )
    database_url: Annotated[SecretStr, AfterValidator(_database_url)] | None = Field(
        None,
        description="Postgres 15 or later; with several hosts, the primary is used; unset: an "
        "embedded Postgres in DATA_DIR",
    )
    pooler: Literal["none", "transaction"] = Field(
        "none",
        description="transaction: DATABASE_URL points to a pooler in transaction mode; none: to "
        "Postgres, or to a pooler in session mode",
    )
    migrate: Literal["on", "off"] = Field(
        "on",
        description="on or off; off: the service changes no table, and starts only if 'latchkey "
        "migrate' has run",
    )
    data_dir: Path = Field(
        default_factory=default_data_dir,
        description="directory of the embedded database and the generated keys",
    )
    workers: int = Field(1, ge=1, le=256, description="server processes that share the address")
    transport: Literal["native", "grpcio"] = Field(
        "native",
        description="native or grpcio; unset: grpcio if other machines can reach LISTEN, else "
        "native",
    )
    connections_max: int = Field(
        10_000, ge=1, le=1_000_000, description="limit of connections to each listener of a worker"
    )
    connections_per_address: int = Field(
        500,
        ge=0,
        le=1_000_000,
        description="limit of connections to each listener of a worker from one IP address, or "
        "IPv6 /64 network; not behind TRUSTED_PROXY; 0: no limit",
    )
    connection_age_seconds: float = Field(
        600.0,
        ge=0,
        le=86_400,
        description="age at which a client must open a new connection (grpcio), or does so with "
        "its Watch (both); 0: never",
    )
    memory_mib: int | None = Field(
        None,
        ge=0,
        le=1_048_576,
        description="MiB of memory at which a worker is restarted; unset: 1024, plus an allowance "
        "for CACHE_ENTRIES and CONNECTIONS_MAX; 0: never",
    )
    pepper_file: Path | None = Field(
        None,
        description="file with the keys for token digests, newest first; unset: DATA_DIR/peppers, "
        "generated for a new database",
    )
    secret_prefix: str = Field(
        "lk", pattern=r"^[a-z]{2,10}$", description="prefix of new secrets: 2-10 of a-z"
    )
    imported_prefixes: Annotated[str, AfterValidator(_imported_prefixes)] | None = Field(
        None,
        description="prefixes of imported secrets, such as sk_live_,sk_test_; *: imported secrets "
        "may have any prefix or none; unset: none are accepted",
    )
    max_ttl: Annotated[str, AfterValidator(_duration)] | None = Field(
        None,
        description="longest time from a Create or Update until the expiry that it sets, such as "
        "90d; a policy can only shorten it; unset: no limit",
    )
    require_expiry: Literal["off", "on"] = Field(
        "off", description="off or on; on: each new token needs an expiry, as with MAX_TTL"
    )
    expired_retention_days: int = Field(
        30,
        ge=1,
        le=36_500,
        description="how many days an expired token stays in lists and keeps its verdict; then it "
        "is removed, and its secret is UNKNOWN",
    )
    tombstone_retention_days: int = Field(
        90,
        ge=1,
        le=36_500,
        description="how many days a deleted token, or an ended secret, keeps its verdict instead "
        "of UNKNOWN",
    )
    audit_retention_days: int = Field(
        365, ge=1, le=36_500, description="how long audit entries are kept"
    )
    webhook_url: Annotated[SecretStr, AfterValidator(webhook.valid_url)] | None = Field(
        None,
        description="URL that receives events about tokens: https, or http on loopback; unset: "
        "events are not recorded",
    )
    webhook_secret_file: Path | None = Field(
        None,
        description="file with the secrets that sign events, newest first: whsec_ and base64, one "
        "per line",
    )
    webhook_events: Annotated[str, AfterValidator(webhook.valid_events)] = Field(
        "all",
        description="events to send, with commas between them: all, or some of "
        + ", ".join(webhook.EVENTS),
    )
    webhook_expiring_days: Annotated[str, AfterValidator(webhook.valid_days)] = Field(
        "7,1", description="how many days before its expiry a token is announced as expiring"
    )
    webhook_retry_days: int = Field(
        3, ge=1, le=90, description="how long an event is sent again if the receiver fails"
    )
    lease_seconds: float = Field(
        3.0,
        ge=0.3,
        le=LEASE_SECONDS_MAX,
        description="how long verifies may be answered from the cache without contact to Postgres, "
        "and how long a Delete may wait for an unresponsive verifier",
    )
    cache: Literal["on", "off"] = Field(
        "on",
        description="on or off; off: each verify reads the database, and clients cache nothing",
    )
    cache_entries: int = Field(
        100_000, ge=1, le=50_000_000, description="cached verdicts per worker, about 500 bytes each"
    )
    cache_seconds: float = Field(
        300.0,
        ge=1,
        le=86_400,
        description="maximum age of a cached verdict before it is read again",
    )
    notify: Literal["on", "off"] = Field(
        "on", description="on or off: LISTEN and NOTIFY, which let a Delete return in milliseconds"
    )
    host_lease: Literal["each", "shared"] = Field(
        "shared",
        description="shared or each; shared: the workers of this host have one lease and one row "
        "together, and need fewer connections to Postgres; each: each worker has its own",
    )
    drain_seconds: float = Field(
        0.1,
        ge=0,
        le=3_600,
        description="how long health reports NOT_SERVING before a stopping service refuses calls",
    )
    grace_seconds: float = Field(
        10.0, ge=0, le=3_600, description="how long calls in progress may take during shutdown"
    )
    drop_root: Literal["on", "off"] = Field(
        "on",
        description="on or off: started as root, workers become the owner of DATA_DIR or of the "
        "embedded Postgres, or latchkey, postgres or nobody",
    )
    core_dumps: Literal["off", "on"] = Field(
        "off",
        description="off or on; on: core dumps and debuggers of the same user, which see keys and "
        "secrets",
    )
    traces: Literal["off", "on"] = Field(
        "off",
        description="off or on; on: traces of calls go to the collector at "
        "OTEL_EXPORTER_OTLP_ENDPOINT, by OTLP over HTTP",
    )
    traces_verify_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of verifies to trace if their callers have no trace, 0 to 1",
    )
    traces_managed_share: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of other calls to trace if their callers have no trace, 0 to 1",
    )
    traces_per_second: float = Field(
        100.0,
        ge=1,
        le=100_000,
        description="maximum calls per second that a worker traces, whatever their callers ask for",
    )
    log_format: Literal["json", "console", "auto"] = Field(
        "auto",
        description="json, without the text for people on stdout; console; or auto: console on a "
        "terminal, else json",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="debug, info, warning or error"
    )
    log_verify_share: float = Field(
        0.0, ge=0, le=1, description="share of successful verifies to log, 0 to 1"
    )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be pickled: the database's password would be in the result, unmasked."""
        raise TypeError("settings cannot be pickled; use to_json for the pipe to a worker")

    @property
    def accepted_prefixes(self) -> tuple[str, ...]:
        """The prefixes of imported secrets. An empty one accepts any."""
        if self.imported_prefixes is None:
            return ()
        return tuple("" if p == "*" else p for p in self.imported_prefixes.split(","))

    @property
    def shares_lease(self) -> bool:
        """Whether the workers of this host have one lease together."""
        return self.workers > 1 and self.host_lease == "shared"

    @property
    def lifetime(self) -> Lifetime:
        """The limit for all tokens."""
        ttl = None if self.max_ttl is None else duration_in(self.max_ttl)
        return Lifetime(ttl, self.require_expiry == "on")

    @property
    def pepper_path(self) -> Path:
        """The path of the pepper file."""
        return self.pepper_file or self.data_dir / "peppers"
