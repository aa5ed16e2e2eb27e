"""The URL of the database, as hosting providers and other tools write it.

Owns which parameters are allowed. libpq's parameters are honoured by the driver (asyncpg), or
dropped here if Latchkey does by itself what they ask for. All others are rejected at startup: the
driver would send them to the server as settings, which the server rejects much later.
"""

import os
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final
from urllib.parse import parse_qsl, urlencode

from pydantic import SecretStr

__all__ = [
    "DATABASE_URL",
    "file_problems",
    "for_driver",
    "problem",
    "redacted",
    "tls_context",
    "valid",
    "warnings",
]

# Not urllib's urlsplit: some versions reject several hosts where one of them is [IPv6].
DATABASE_URL: Final = re.compile(
    r"(postgres(?:ql)?://)(?:([^/?#]*)@)?([^/?#@]*)(/[^?#@]*)?(\?[^#@]*)?"
)

# Strings, because literals would take a line for each name.
# The driver does what libpq does.
_HONOURED: Final = (
    "database dbname host krbsrvname gsslib passfile password port service sslcert sslcrl sslkey "
    "sslmode sslnegotiation sslpassword sslrootcert ssl_max_protocol_version "
    "ssl_min_protocol_version user"
)
# Settings of the session, which the driver passes on to the server. `options` holds any others.
_SETTINGS: Final = (
    "DateStyle IntervalStyle TimeZone idle_in_transaction_session_timeout jit lock_timeout options "
    "role search_path statement_timeout synchronous_commit work_mem"
)
# Latchkey has its own bounds, its own name, and sees to the primary itself.
_DROPPED: Final = (
    "application_name channel_binding client_encoding connect_timeout fallback_application_name "
    "gssencmode keepalives keepalives_count keepalives_idle keepalives_interval "
    "load_balance_hosts sslcompression sslsni target_session_attrs tcp_user_timeout"
)
# What to do about parameters that people are likely to have.
_ADVICE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "pgbouncer": "remove it, and set LATCHKEY_POOLER=transaction if the URL leads to a pooler "
        "in transaction mode",
        "schema": "it is Prisma's; use search_path=NAME instead",
        "currentSchema": "it is JDBC's; use search_path=NAME instead",
        "ssl": "use sslmode=require, or sslmode=verify-full with sslrootcert=system or a file",
        "connection_limit": "it is Prisma's; remove it",
        "pool_timeout": "it is Prisma's; remove it",
        "hostaddr": "put the address in place of the host",
        "sslcrldir": "use sslcrl=FILE",
        "requirepeer": "the driver cannot check it; remove it",
        "require_auth": "the driver cannot check it; use sslmode=verify-full instead",
    }
)
_TLS_FILES: Final = ("sslrootcert", "sslcert", "sslkey", "sslcrl")
_ALL: Final = frozenset(f"{_HONOURED} {_SETTINGS} {_DROPPED}".split())
# libpq's name for the CAs of the operating system.
_SYSTEM: Final = "system"


def valid(value: SecretStr) -> SecretStr:
    """Return the URL of a setting. Raises ValueError, which quotes no part of it."""
    url = value.get_secret_value()
    if url.partition("://")[0] not in ("postgresql", "postgres"):
        raise ValueError("must be postgresql://USER:PASSWORD@HOST:PORT/DATABASE")
    # An unescaped character that ends the password early would expose the rest of it in messages.
    match = DATABASE_URL.fullmatch(url)
    ports = re.findall(r":([^:\],]*)(?:,|$)", match[3]) if match else []
    if match is None or set("@[]") & set(match[2] or "") or not all(map(str.isdigit, ports)):
        raise ValueError(
            "percent-encode the password: / as %2F, # as %23, ? as %3F, @ as %40, [ as %5B"
        )
    if "," in match[3] and not all(match[3].split(",")):
        # libpq would use this machine for an empty host.
        raise ValueError("a host is missing next to a comma")
    if re.search(r"[?&]host=[^&]*(,|%2C)", match[5] or "", re.IGNORECASE):
        raise ValueError("put several hosts before the database name: HOST:PORT,HOST:PORT")
    if (wrong := problem(url)) is not None:
        raise ValueError(wrong)
    return value


def problem(url: str) -> str | None:
    """Return what is wrong with the parameters of a URL, or None. Names no values."""
    try:
        parameters = _parameters(url)
    except ValueError:
        return "the part after ? must have the form NAME=VALUE&NAME=VALUE"
    for name, value in parameters.items():
        if name not in _ALL and "." not in name:
            advice = _ADVICE.get(
                name, "remove it, or if it is a setting of Postgres, set it for the role"
            )
            return f"the parameter {_shown(name)} is not supported; {advice}"
        if name == "gssencmode" and value == "require":
            return "gssencmode=require is not supported; use sslmode=verify-full instead"
    if (
        parameters.get("sslrootcert") == _SYSTEM
        and parameters.get("sslmode", "verify-full") != "verify-full"
    ):
        return "sslrootcert=system requires sslmode=verify-full, as in libpq"
    return None


def warnings(url: str) -> list[str]:
    """Return a sentence for each parameter that protects less than it says."""
    if _parameters(url).get("channel_binding") != "require":
        return []
    text = (
        "channel_binding=require has no effect, because the database driver does not support it; "
        "sslmode=verify-full with sslrootcert=system protects as well"
    )
    return [text]


def file_problems(url: str) -> list[str]:
    """Return a sentence for each TLS file that the URL or the environment names in vain."""
    parameters = _parameters(url)
    found = []
    for name in _TLS_FILES:
        path = parameters.get(name) or os.environ.get(f"PG{name.upper()}")
        if not path or (name == "sslrootcert" and path == _SYSTEM):
            continue
        try:
            with Path(path).open("rb"):
                pass
        except OSError as error:
            found.append(f"{name} of the database: {path}: {error.strerror}")
    return found


def for_driver(url: str) -> str:
    """Return the URL without the parameters that the driver would send to the server."""
    parameters = _parameters(url)
    drop = set(_DROPPED.split())
    if parameters.get("sslrootcert") == _SYSTEM:
        drop |= {*_TLS_FILES, "sslmode", "sslpassword"}
    kept = [(name, value) for name, value in parameters.items() if name not in drop]
    if len(kept) == len(parameters):
        return url
    return url.partition("?")[0] + ("?" + urlencode(kept) if kept else "")


def tls_context(url: str) -> ssl.SSLContext | None:
    """Return the context for `sslrootcert=system`, or None if the driver makes its own.

    Raises OSError if the client's certificate cannot be loaded.
    """
    parameters = _parameters(url)
    if parameters.get("sslrootcert") != _SYSTEM:
        return None
    context = ssl.create_default_context()
    if "sslcert" in parameters:
        context.load_cert_chain(
            parameters["sslcert"], parameters.get("sslkey"), parameters.get("sslpassword", "")
        )
    if "sslcrl" in parameters:
        context.load_verify_locations(parameters["sslcrl"])
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
    return context


def _parameters(url: str) -> dict[str, str]:
    """Return the parameters; of several with the same name, the last. Raises ValueError."""
    query = url.partition("?")[2]
    if not query:
        return {}
    return dict(parse_qsl(query, keep_blank_values=True, strict_parsing=True))


def _shown(name: str) -> str:
    """Return a name as a message may quote it: the end of a password may have become part of it."""
    return name if re.fullmatch(r"\w{1,40}", name) else "with an unusual name"


def redacted(url: str) -> str:
    """Return a database URL without its password, wherever it is."""
    match = DATABASE_URL.fullmatch(url)
    if match is None:
        return "***"
    scheme, user, hosts, path, query = (part or "" for part in match.groups())
    if user:
        user = user.partition(":")[0] + (":***@" if ":" in user else "@")
    query = re.sub(r"((?:^\?|&)(?:\w*password\w*)=)[^&]*", r"\1***", query, flags=re.IGNORECASE)
    return scheme + user + hosts + path + query
