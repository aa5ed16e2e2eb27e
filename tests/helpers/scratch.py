"""Where tests keep the data of Postgres: in memory if the system allows that."""

import os
from pathlib import Path
from typing import Final

__all__ = ["SCRATCH"]

_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - for mkdtemp
# Several test processes with a few clusters each. Containers often have only 64 MB.
_FREE_BYTES_MIN: Final = 4 << 30


def _fits(folder: Path) -> bool:
    """Return whether clusters fit there, and whether the copied programs could run there."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return False
    roomy = status.f_bavail * status.f_frsize >= _FREE_BYTES_MIN
    return roomy and not status.f_flag & os.ST_NOEXEC and os.access(folder, os.W_OK)


# Postgres creates a database from a template six times as fast there, and a cluster three times. No
# test crashes the machine, so none needs a disk. Not pytest's folders, which are closed to the
# account that runs Postgres if root runs the tests.
SCRATCH: Final = _SHARED_MEMORY if _fits(_SHARED_MEMORY) else Path("/tmp")  # noqa: S108 - as above
