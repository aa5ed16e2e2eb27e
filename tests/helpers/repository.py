"""Where the repository's files are."""

from pathlib import Path

__all__ = ["ROOT"]

ROOT = Path(__file__).parents[2]
