"""Where the embedded database and generated keys are kept."""

import os
from pathlib import Path

import platformdirs

__all__ = ["default_data_dir"]

SYSTEM_DATA_DIR = Path("/var/lib/latchkey")


def default_data_dir() -> Path:
    """Return the data directory to use if LATCHKEY_DATA_DIR is not set."""
    if os.geteuid() == 0:  # Root's home is often 0700, so PostgreSQL's account cannot enter it.
        return SYSTEM_DATA_DIR
    try:
        return Path(platformdirs.user_data_dir("latchkey", appauthor=False))
    except RuntimeError:
        # A user without a home, as in some containers. With a database and a pepper file of its
        # own, the service needs no data directory. Otherwise, the error at its first use names this
        # one.
        return SYSTEM_DATA_DIR
