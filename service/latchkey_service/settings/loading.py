"""Reads the settings, checks them together, and passes them to workers through a pipe.

The service reads them once, at startup.
"""

import json
import os
from pathlib import Path

from dotenv import dotenv_values
from pydantic import SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from latchkey_service.settings import database_url, exposure, file_access, traces, webhook
from latchkey_service.settings.settings import ENV_FILE, PREFIX, Settings
from latchkey_service.settings.spelling import misspelled

__all__ = [
    "READY",
    "ConfigError",
    "describe",
    "file_warnings",
    "from_json",
    "load",
    "to_json",
]

# A worker prints this on stdout once it answers calls; the supervisor waits for it.
READY = b"ready\n"


class ConfigError(Exception):
    """A setting is invalid. The message names it and its valid values, but not its actual value."""


class _ReceivedSettings(Settings):
    """Settings from the supervisor; ignores this process's environment and .env file."""

    # Otherwise pydantic would still read the file, and fail if it is not text.
    model_config = SettingsConfigDict(env_file=None)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - pydantic's signature
        init_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def load(*, together: bool = True) -> Settings:
    """Return the settings. Raises ConfigError, which names every invalid setting.

    With `together`, also rejects settings that contradict each other.
    """
    _check_env_file()
    try:
        settings = Settings()
    except ValidationError as error:
        raise _config_error(error) from None
    names = [*os.environ, *dotenv_values(ENV_FILE)]
    if wrong := misspelled(PREFIX, Settings.model_fields, names):
        raise ConfigError("\n".join(wrong))
    if together:
        _check_together(settings)
    return settings


def _check_env_file() -> None:
    """Raise ConfigError if another user can change our settings."""
    path = Path(ENV_FILE).absolute()
    try:
        problem = file_access.refusal(path, path.stat(), file_access.ENVIRONMENT)
    except OSError:
        # There is no such file, or pydantic reports that it cannot be read.
        return
    if problem is not None:
        raise ConfigError(problem)


def file_warnings(settings: Settings) -> list[str]:
    """Return warnings about the owner or mode of files that are used nevertheless."""
    files = [
        (Path(ENV_FILE).absolute(), file_access.ENVIRONMENT),
        (settings.policy, file_access.POLICY),
        (settings.tls_key, file_access.TLS_KEY),
        (settings.tls_certificate, file_access.CERTIFICATE),
        (settings.tls_client_ca, file_access.CERTIFICATE),
    ]
    found = [None if path is None else file_access.warning(path, rule) for path, rule in files]
    return [text for text in found if text is not None]


def to_json(settings: Settings) -> str:
    """Serialize the settings to one line, with passwords, for a pipe to a worker."""
    values = {name: getattr(settings, name) for name in settings.model_fields_set}
    return json.dumps(values, default=_plain) + "\n"


def from_json(line: bytes) -> Settings:
    """Return the settings in a line of `to_json`. Raises ConfigError."""
    try:
        settings = _ReceivedSettings(**json.loads(line))
    except ValidationError as error:
        raise _config_error(error) from None
    except (ValueError, TypeError):
        raise ConfigError("received no settings from the supervisor") from None
    _check_together(settings)
    return settings


def _plain(value: object) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def _config_error(error: ValidationError) -> ConfigError:
    lines = [
        f"{PREFIX}{str(e['loc'][0]).upper()}: {e['msg'].removeprefix('Value error, ')}"
        for e in error.errors(include_input=False, include_url=False)
    ]
    return ConfigError("\n".join(lines))


def _check_together(settings: Settings) -> None:
    problems = exposure.problems(settings) + traces.problems(settings.traces, os.environ)
    if problems:
        raise ConfigError("\n".join(problems))


def describe(settings: Settings) -> list[tuple[str, str, str, str]]:
    """Return the name, current value (redacted), source and description of each setting."""
    rows = []
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        if name == "transport":
            value = exposure.transport_of(settings)
        if isinstance(value, SecretStr):
            redacted = webhook.redacted if name == "webhook_url" else database_url.redacted
            text = redacted(value.get_secret_value())
        else:
            text = "" if value is None else str(value)
        source = "set" if name in settings.model_fields_set else "default"
        rows.append((PREFIX + name.upper(), text, source, field.description or ""))
    return rows
