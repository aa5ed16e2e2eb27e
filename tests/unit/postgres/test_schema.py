"""Which releases work with which schema, decided from the files and the rows in the database."""

import pytest
from latchkey_service.postgres.schema import (
    Applied,
    Migration,
    MigrationError,
    bundled,
    missing,
    newest,
    require,
)

OLD = [Migration(number, f"step_{number}", f"SELECT {number};") for number in (1, 2, 3)]
EXPAND = Migration(4, "expand", "-- Releases from schema 0003 work with this.\nSELECT 4;")
EARLY = Migration(4, "early", "-- This release works without it too.\nSELECT 4;")
CONTRACT = Migration(5, "contract", "-- Releases from schema 0004 work with this.\nSELECT 5;")


def rows(*migrations: Migration) -> list[Applied]:
    """Return the rows that these migrations leave in the database."""
    return [Applied(m.version, m.checksum, m.oldest_release) for m in migrations]


def test_a_release_works_with_a_newer_schema_that_names_it() -> None:
    """A rollout can be rolled back: the release before an expansion finds nothing to do."""
    assert missing(OLD, rows(*OLD, EXPAND)) == []


def test_a_release_refuses_a_schema_that_needs_a_newer_one() -> None:
    """The release before an expansion does not start once the contraction is applied, and a release
    with the expansion does."""
    with pytest.raises(MigrationError, match=r"migration 5.*from schema 0004, and this one has.*3"):
        missing(OLD, rows(*OLD, EXPAND, CONTRACT))
    assert missing([*OLD, EXPAND], rows(*OLD, EXPAND, CONTRACT)) == []


@pytest.mark.parametrize("recorded", [None, 9])
def test_a_migration_that_names_no_release_works_with_no_earlier_one(recorded: int | None) -> None:
    """A file without the line, and a row from before the column, exclude all earlier releases."""
    assert Migration(9, "silent", "SELECT 9;").oldest_release == 9
    with pytest.raises(MigrationError, match="which this release does not know"):
        missing(OLD, [*rows(*OLD), Applied(9, "x", recorded)])


def test_no_release_applies_an_old_migration_under_a_newer_one() -> None:
    """A release whose own migrations are incomplete does not add them below unknown ones."""
    with pytest.raises(MigrationError, match="run 'latchkey migrate' of the newer release"):
        missing(OLD, rows(*OLD[:2], EXPAND))


def test_a_changed_file_is_refused() -> None:
    """A released file must not change."""
    with pytest.raises(MigrationError, match="must never change"):
        missing(OLD, [*rows(*OLD[:2]), Applied(3, "other", 3)])


def test_only_needed_migrations_stop_a_service_that_must_not_migrate() -> None:
    """A release starts before a migration that only its successor needs."""
    lacking = missing([*OLD, EARLY], rows(*OLD))
    require(lacking)
    with pytest.raises(MigrationError, match=r"lacks migration 0003 \(step_3\).*latchkey migrate"):
        require(missing([*OLD, EARLY], rows(*OLD[:2])))


def test_the_bundled_files_name_earlier_releases_only() -> None:
    """No file claims to work with releases that do not exist yet."""
    assert all(0 < m.oldest_release <= m.version for m in bundled())
    assert newest(bundled()) == bundled()[-1].version
    assert newest([]) == 0
