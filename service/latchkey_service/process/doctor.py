"""`latchkey doctor`: checks this host's settings, files, database and addresses.

Owns the order of the checks, their bound in time, and how findings are shown. It works while the
service is down, changes nothing, and prints no secret.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from latchkey_service.postgres.embedded_cluster import EmbeddedPostgres
from latchkey_service.postgres.embedded_host import EmbeddedError
from latchkey_service.postgres.schema import bundled, newest
from latchkey_service.process.doctor_database import database_findings
from latchkey_service.process.doctor_files import (
    certificate_findings,
    file_findings,
    pepper_finding,
    policy_finding,
)
from latchkey_service.process.doctor_listeners import listener_findings
from latchkey_service.process.finding import Finding, failure, ok, skipped
from latchkey_service.release import release
from latchkey_service.settings import loading
from latchkey_service.settings.database_url import DATABASE_URL
from latchkey_service.settings.settings import Settings

__all__ = ["examine", "run"]

# Enough for a few hosts that do not answer, and for a slow database.
DATABASE_SECONDS: Final = 40.0
# An address has two attempts of 2 s each.
LISTENER_SECONDS: Final = 15.0
_MARKS: Final = {"ok": "ok", "warning": "WARNING", "failure": "FAILURE", "skipped": "-"}


def run(arguments: list[str]) -> int:
    """Run `doctor` and return the exit code: 1 if a check failed, 2 for a wrong argument."""
    parser = argparse.ArgumentParser("latchkey doctor", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--host", help="name by which clients reach the TLS listener")
    parser.add_argument("--ca", type=Path, help="file with the CAs that clients trust")
    given = parser.parse_args(arguments)
    found = asyncio.run(examine(given.host, given.ca))
    failed = any(finding.state == "failure" for finding in found)
    if given.json:
        document = {
            "release": release(),
            "schema": newest(bundled()),
            "healthy": not failed,
            "findings": [asdict(finding) for finding in found],
        }
        _say(json.dumps(document, indent=2))
    else:
        _show(found)
    return 1 if failed else 0


def _utc_now() -> datetime:
    return datetime.now(UTC)


async def examine(
    host: str | None = None, ca: Path | None = None, clock: Callable[[], datetime] = _utc_now
) -> list[Finding]:
    """Return the findings of all checks.

    `host` is the name that clients use, `ca` a file with the CAs that they trust.
    """
    try:
        settings = loading.load()
    except loading.ConfigError as error:
        lines = str(error).splitlines()
        found = [failure("settings", line, "see 'latchkey config --help'") for line in lines]
        return [*found, skipped("everything else", "the settings must be valid first")]
    set_ = sorted(settings.model_fields_set)
    found = [ok("settings", f"valid; set: {', '.join(set_) or 'none'}")]
    found += file_findings(settings)
    found.append(policy_finding(settings))
    found += certificate_findings(settings, clock(), host, ca)
    peppers, pepper_ids = pepper_finding(settings)
    found.append(peppers)
    found += await _database(settings, pepper_ids, clock)
    try:
        async with asyncio.timeout(LISTENER_SECONDS):
            # In a thread: gRPC's own client blocks.
            found += await asyncio.to_thread(listener_findings, settings)
    except TimeoutError:
        found.append(failure("listener", f"no answer within {LISTENER_SECONDS:g} s"))
    return [_without_secrets(finding, settings) for finding in found]


async def _database(
    settings: Settings, pepper_ids: list[str] | None, clock: Callable[[], datetime]
) -> list[Finding]:
    check = "database"
    if settings.database_url is not None:
        url = settings.database_url.get_secret_value()
    else:
        try:
            url = EmbeddedPostgres(settings.data_dir).dsn()
        except (EmbeddedError, OSError):
            return [ok(check, f"none in {settings.data_dir} yet: the service makes one")]
    try:
        async with asyncio.timeout(DATABASE_SECONDS):
            found = await database_findings(settings, url, pepper_ids, clock)
    except TimeoutError:
        text = f"the checks did not end within {DATABASE_SECONDS:g} s"
        return [failure(check, text, "look at the load of the database, and at the network")]
    if settings.database_url is None and [f.state for f in found] == ["failure"]:
        return [ok(check, f"the one in {settings.data_dir} does not run: the service starts it")]
    return found


def _without_secrets(finding: Finding, settings: Settings) -> Finding:
    """Return a finding without the database's password, should a driver's message quote its URL.

    Only beside the @, because *** in place of a word would show that the word is the password.
    """
    if settings.database_url is None:
        return finding
    match = DATABASE_URL.fullmatch(settings.database_url.get_secret_value())
    quoted = (match[2] or "").partition(":")[2] if match else ""
    text, what_to_do = finding.text, finding.what_to_do
    for secret in filter(None, (quoted, unquote(quoted))):
        text, what_to_do = (each.replace(f":{secret}@", ":***@") for each in (text, what_to_do))
    return Finding(finding.check, finding.state, text, what_to_do)


def _show(found: list[Finding]) -> None:
    width = max(len(finding.check) for finding in found)
    for finding in found:
        _say(f"{_MARKS[finding.state]:8} {finding.check:{width}}  {finding.text}")
        if finding.what_to_do:
            _say(f"{'':8} {'':{width}}  -> {finding.what_to_do}")
    count = {state: sum(f.state == state for f in found) for state in ("failure", "warning")}
    _say(f"{count['failure']} failures, {count['warning']} warnings; release {release()}")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
