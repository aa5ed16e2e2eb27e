"""The numbered SQL files, and which releases work with a schema. Pure.

The number of a release's newest file is the number of its schema. Each file may say in a comment
which earlier releases still work once it is applied, and whether its own release works without it.
So a rollout can be rolled back: an older release starts on a newer schema that names it.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Final

__all__ = ["Applied", "Migration", "MigrationError", "bundled", "missing", "newest", "require"]

# Without this line, no earlier release works with the schema.
_OLDEST: Final = re.compile(r"^-- Releases from schema (\d{4}) work with this\.$", re.MULTILINE)
# Without this line, the release does not work before the migration.
_OPTIONAL: Final = re.compile(r"^-- This release works without it too\.$", re.MULTILINE)


class MigrationError(Exception):
    """The database cannot be used with this release. The message says what to do."""


@dataclass(frozen=True, slots=True)
class Migration:
    """A numbered SQL file."""

    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the file's text, in hexadecimal."""
        return hashlib.sha256(self.sql.encode()).hexdigest()

    @property
    def oldest_release(self) -> int:
        """The lowest schema number whose release works once this migration is applied."""
        match = _OLDEST.search(self.sql)
        return int(match[1]) if match else self.version

    @property
    def needed(self) -> bool:
        """Whether this release needs the migration."""
        return _OPTIONAL.search(self.sql) is None

    def __str__(self) -> str:
        return f"{self.version:04} ({self.name})"


@dataclass(frozen=True, slots=True)
class Applied:
    """A row of `schema_migration`."""

    version: int
    checksum: str
    oldest_release: int | None
    """None if an early release applied it, which recorded no such number."""


def bundled() -> list[Migration]:
    """Return this release's migrations, in order."""
    found = []
    for file in resources.files("latchkey_service").joinpath("postgres", "migrations").iterdir():
        match = re.fullmatch(r"(\d{4})_(\w+)\.sql", file.name)
        if match:
            found.append(Migration(int(match[1]), match[2], file.read_text("utf-8")))
    found.sort(key=lambda migration: migration.version)
    return found


def newest(migrations: Sequence[Migration]) -> int:
    """Return the schema number of a release with these migrations."""
    return max((migration.version for migration in migrations), default=0)


def missing(migrations: Sequence[Migration], applied: Sequence[Applied]) -> list[Migration]:
    """Return the migrations that a database lacks, in order.

    Raises MigrationError if the release does not work with those that are applied.
    """
    own = newest(migrations)
    known = {migration.version: migration for migration in migrations}
    ahead = [row for row in applied if row.version not in known]
    for row in sorted(ahead, key=lambda row: -row.version):
        oldest = row.version if row.oldest_release is None else row.oldest_release
        if oldest > own:
            raise MigrationError(
                f"the database has migration {row.version}, which this release does not know; it "
                f"works with releases from schema {oldest:04}, and this one has schema {own:04}; "
                "run the release that applied it, or a newer one"
            )
    for row in applied:
        migration = known.get(row.version)
        if migration is not None and row.checksum != migration.checksum:
            raise MigrationError(
                f"migration {migration} differs from the one that was applied to this database; "
                "a released migration must never change"
            )
    versions = {row.version for row in applied}
    lacking = [migration for migration in migrations if migration.version not in versions]
    if lacking and ahead:
        raise MigrationError(
            f"the database has migration {ahead[-1].version}, which this release does not know, "
            f"but lacks {lacking[0]}; run 'latchkey migrate' of the newer release"
        )
    return lacking


def require(lacking: Sequence[Migration]) -> None:
    """Raise MigrationError if this release needs one of the migrations that the database lacks."""
    if needed := [migration for migration in lacking if migration.needed]:
        raise MigrationError(
            f"the database lacks migration {needed[0]}, and LATCHKEY_MIGRATE=off; run "
            "'latchkey migrate' as the owner of its tables, before this release starts"
        )
