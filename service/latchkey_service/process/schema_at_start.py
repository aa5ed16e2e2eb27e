"""The schema at the start of a service: migrates it, or checks that this release works with it.

Owns what `LATCHKEY_MIGRATE` means. `schema.py` decides which schemas a release works with.
"""

from latchkey_service.postgres.migrate import bundled, migrate, pending
from latchkey_service.postgres.preflight import Workers
from latchkey_service.postgres.schema import require
from latchkey_service.settings.logs import logger
from latchkey_service.settings.settings import Settings

__all__ = ["prepare_schema"]


async def prepare_schema(settings: Settings, url: str) -> None:
    """Apply the missing migrations, or check that this release needs none of them.

    Raises MigrationError and StoreUnavailable.
    """
    of = (url, bundled(), settings.pooler, Workers(settings.workers, settings.shares_lease))
    if settings.migrate == "on":
        for migration in await migrate(*of):
            logger().info("migrated", version=migration.version, name=migration.name)
        return
    lacking = await pending(*of)
    require(lacking)
    for migration in lacking:
        logger().warning(
            "a migration is missing, and this release works without it",
            version=migration.version,
            name=migration.name,
            what_to_do="run 'latchkey migrate' before the next upgrade",
        )
