"""Settings: environment variables with the prefix LATCHKEY_, and the same names in a .env file.

Both are read once, when the service starts: its workers get its settings from it, by a pipe.
"""

import difflib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from dotenv import dotenv_values
from latchkey_coherence.lease import LEASE_SECONDS_MAX
from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from latchkey_service import exposure
from latchkey_service.embedded import default_data_dir

__all__ = ["ConfigError", "Settings", "describe", "from_json", "load", "to_json"]

PREFIX = "LATCHKEY_"
ENV_FILE = ".env"
# So many letters are other ones, missing or too many where a name is another with a mistake in it.
MISSPELT_MAX = 2
# What Kubernetes has in the environment of each service whose name begins with "latchkey-".
_OF_KUBERNETES = re.compile(r".*_(PORT|SERVICE_HOST|SERVICE_PORT(_.*)?|PORT_\d+_(TCP|UDP)(_.*)?)")
# What a worker writes to its standard output once it answers calls; the supervisor waits for it.
READY = b"ready\n"


class ConfigError(Exception):
    """A setting is wrong. The message names it and says what it should be, not what it holds."""


def _listen(value: str) -> str:
    """Accept HOST:PORT, [IPv6]:PORT and unix:PATH."""
    if value.startswith("unix:"):
        path = value.removeprefix("unix:").removeprefix("//")
        # sun_path has 108 bytes, the last of them NUL.
        if not 0 < len(os.fsencode(path)) < 108:
            raise ValueError("the path of a UNIX socket has 1-107 bytes")
        return "unix:" + str(Path(path).absolute())
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.%\w]+\]|[^:\s\[\]]+):(\d{1,5})", value)
    if match is None or int(match[2]) > 65535:
        raise ValueError("give HOST:PORT, such as 127.0.0.1:50051, or unix:PATH")
    return value


# Not urllib's urlsplit: several hosts, one of them [IPv6], are refused by some of its versions.
_DATABASE_URL = re.compile(r"(postgres(?:ql)?://)(?:([^/?#]*)@)?([^/?#@]*)(/[^?#@]*)?(\?[^#@]*)?")


def _database_url(value: SecretStr) -> SecretStr:
    url = value.get_secret_value()
    if url.partition("://")[0] not in ("postgresql", "postgres"):
        raise ValueError("give postgresql://USER:PASSWORD@HOST:PORT/DATABASE")
    # Whatever ends a password early leaves the rest of it where it would be shown.
    match = _DATABASE_URL.fullmatch(url)
    ports = re.findall(r":([^:\],]*)(?:,|$)", match[3]) if match else []
    if match is None or set("@[]") & set(match[2] or "") or not all(map(str.isdigit, ports)):
        raise ValueError(
            "percent-encode the password: / as %2F, # as %23, ? as %3F, @ as %40, [ as %5B"
        )
    if "," in match[3] and not all(match[3].split(",")):
        # None would be this machine's.
        raise ValueError("a host is missing beside a comma")
    if re.search(r"[?&]host=[^&]*(,|%2C)", match[5] or "", re.IGNORECASE):
        raise ValueError("give several hosts before the database's name: HOST:PORT,HOST:PORT")
    return value


class Settings(BaseSettings):
    """All settings. Each field's description is what `latchkey config` and the README show."""

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
        None, description="TLS 1.3 address, beside LISTEN: HOST:PORT"
    )
    tls_certificate: Path | None = Field(
        None, description="PEM file of the server's certificate and those between it and its CA"
    )
    tls_key: Path | None = Field(None, description="PEM file of that certificate's private key")
    tls_client_ca: Path | None = Field(
        None,
        description="PEM file of the CAs of client certificates, which TLS_LISTEN then requires",
    )
    policy: Path | None = Field(
        None, description="file that says who may call; unset: everyone, on this machine only"
    )
    trusted_proxy: str | None = Field(
        None,
        pattern=r"^[A-Za-z][A-Za-z0-9+.-]*://[^\s,;=\"]+$",
        description="URI in the certificate of the proxy whose x-forwarded-client-cert is believed",
    )
    insecure_listen: Literal["none", "plaintext", "anonymous"] = Field(
        "none",
        description="what LISTEN may be on other addresses than this machine's own: plaintext "
        "with a policy, or anonymous without one",
    )
    reflection: Literal["auto", "on", "off"] = Field(
        "auto",
        description="on or off: describe the service to whoever asks; auto: on loopback and UNIX "
        "sockets, not behind a proxy",
    )
    database_url: Annotated[SecretStr, AfterValidator(_database_url)] | None = Field(
        None,
        description="any Postgres from 15 on, of several hosts the primary; "
        "unset: an embedded one in DATA_DIR",
    )
    pooler: Literal["none", "transaction"] = Field(
        "none",
        description="transaction: DATABASE_URL leads to a pooler that shares connections by "
        "transaction; none: to Postgres itself, or to a pooler in session mode",
    )
    data_dir: Path = Field(
        default_factory=default_data_dir,
        description="embedded database and generated keys",
    )
    workers: int = Field(1, ge=1, le=256, description="server processes sharing the address")
    transport: Literal["native", "grpcio"] = Field(
        "native",
        description="native or grpcio; unless set, grpcio where more than this machine reaches it",
    )
    connections_max: int = Field(
        10_000, ge=1, le=1_000_000, description="connections to each listener of a worker"
    )
    connection_age_seconds: float = Field(
        600.0,
        ge=0,
        le=86_400,
        description="when a client is sent to a new connection (grpcio), or with its Watch (both); "
        "0: never",
    )
    memory_mib: int | None = Field(
        None,
        ge=0,
        le=1_048_576,
        description="MiB of memory at which a worker is ended and started again; unset: 1024 and "
        "what CACHE_ENTRIES and CONNECTIONS_MAX may take; 0: never",
    )
    pepper_file: Path | None = Field(
        None,
        description="keys for digests, newest first; unset: DATA_DIR/peppers, generated for a "
        "database without any",
    )
    secret_prefix: str = Field(
        "lk", pattern=r"^[a-z]{2,10}$", description="what new secrets begin with: 2-10 of a-z"
    )
    tombstone_retention_days: int = Field(
        90, ge=1, le=36_500, description="how long a deleted token is told DELETED, not UNKNOWN"
    )
    audit_retention_days: int = Field(
        365, ge=1, le=36_500, description="how long it is kept who managed tokens"
    )
    lease_seconds: float = Field(
        3.0,
        ge=0.3,
        le=LEASE_SECONDS_MAX,
        description="how long verifies may be answered from memory without word from Postgres, "
        "and a Delete may have to wait for a verifier that hangs",
    )
    cache: Literal["on", "off"] = Field(
        "on", description="on or off; off: each verify reads the database, in client libraries too"
    )
    cache_entries: int = Field(
        100_000, ge=1, le=50_000_000, description="verdicts a worker remembers, some 500 bytes each"
    )
    cache_seconds: float = Field(
        300.0,
        ge=1,
        le=86_400,
        description="after how many seconds at most a remembered verdict is read again",
    )
    notify: Literal["on", "off"] = Field(
        "on", description="on or off: LISTEN and NOTIFY, which make deletions take milliseconds"
    )
    grace_seconds: float = Field(
        10.0, ge=0, le=3_600, description="how long calls in flight may take once it stops"
    )
    log_format: Literal["json", "console", "auto"] = Field(
        "auto", description="json or console; auto: console on a terminal"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="debug, info, warning or error"
    )
    log_verify_share: float = Field(
        0.0, ge=0, le=1, description="share of successful verifies that get a log line, 0 to 1"
    )

    @property
    def pepper_path(self) -> Path:
        """Where the peppers are."""
        return self.pepper_file or self.data_dir / "peppers"


class _Handed(Settings):
    """Settings of another process: neither this one's environment nor a file adds to them."""

    # Or it is read all the same, and one that is no text is an error.
    model_config = SettingsConfigDict(env_file=None)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def load(*, together: bool = True) -> Settings:
    """Return the settings in force. Raises ConfigError, which names every setting that is wrong.

    With `together` also those that do not go together.
    """
    try:
        settings = Settings()
    except ValidationError as error:
        raise _told(error) from None
    if wrong := _misspelt([*os.environ, *dotenv_values(ENV_FILE)]):
        raise ConfigError("\n".join(wrong))
    if together:
        _check_together(settings)
    return settings


def to_json(settings: Settings) -> str:
    """Return all that is set as one line, passwords and all: for a pipe to a process of our own."""
    values = {name: getattr(settings, name) for name in settings.model_fields_set}
    return json.dumps(values, default=_plain) + "\n"


def from_json(line: bytes) -> Settings:
    """Return the settings that `to_json` made a line of. Raises ConfigError."""
    try:
        settings = _Handed(**json.loads(line))
    except ValidationError as error:
        raise _told(error) from None
    except (ValueError, TypeError):
        raise ConfigError("no settings came from the supervisor") from None
    _check_together(settings)
    return settings


def _plain(value: object) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def _told(error: ValidationError) -> ConfigError:
    lines = [
        f"{PREFIX}{str(e['loc'][0]).upper()}: {e['msg'].removeprefix('Value error, ')}"
        for e in error.errors(include_input=False, include_url=False)
    ]
    return ConfigError("\n".join(lines))


def _misspelt(names: Iterable[str]) -> list[str]:
    """Tell of each name that is all but a setting's. Nobody would see that a policy was ignored.

    Other names with the prefix are others': the command line's, the page's, the deployer's own.
    """
    settings = [name.upper() for name in Settings.model_fields]
    told = []
    for name in dict.fromkeys(names):
        given = name.upper().removeprefix(PREFIX)
        if given == name.upper() or given in settings or _OF_KUBERNETES.fullmatch(name.upper()):
            continue
        if meant := [each for each in settings if _mistakes(given, each) <= MISSPELT_MAX]:
            told.append(f"{name}: there is no such setting; {PREFIX}{meant[0]} is meant?")
    return told


def _mistakes(given: str, meant: str) -> int:
    """Return by how many letters two names differ, about: one in another place counts twice."""
    blocks = difflib.SequenceMatcher(None, given, meant, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in blocks if kind != "equal")


def _check_together(settings: Settings) -> None:
    if problems := exposure.problems(settings):
        raise ConfigError("\n".join(problems))


def describe(settings: Settings) -> list[tuple[str, str, str, str]]:
    """Return name, value in force (redacted), source and description of each setting."""
    rows = []
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        if name == "transport":
            value = exposure.transport_of(settings)
        if isinstance(value, SecretStr):
            text = _redacted(value.get_secret_value())
        else:
            text = "" if value is None else str(value)
        source = "set" if name in settings.model_fields_set else "default"
        rows.append((PREFIX + name.upper(), text, source, field.description or ""))
    return rows


def _redacted(url: str) -> str:
    """Return a database URL without its password, wherever that stands."""
    match = _DATABASE_URL.fullmatch(url)
    if match is None:
        return "***"
    scheme, user, hosts, path, query = (part or "" for part in match.groups())
    if user:
        user = user.partition(":")[0] + (":***@" if ":" in user else "@")
    query = re.sub(r"((?:^\?|&)(?:\w*password\w*)=)[^&]*", r"\1***", query, flags=re.IGNORECASE)
    return scheme + user + hosts + path + query
