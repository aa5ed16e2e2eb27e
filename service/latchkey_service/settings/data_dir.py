"""Where the embedded database and generated keys are kept."""

import os
from pathlib import Path

import platformdirs

__all__ = ["default_data_dir"]


def default_data_dir() -> Path:
    """Return the data directory to use if LATCHKEY_DATA_DIR is not set."""
    if os.geteuid() == 0:  # Root's home is often 0700, so PostgreSQL's account cannot enter it.
        return Path("/var/lib/latchkey")
    return Path(platformdirs.user_data_dir("latchkey", appauthor=False))
