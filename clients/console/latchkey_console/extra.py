"""The libraries that the page needs beyond those of the command line: the extra `console`.

This module imports none of them, so that it can say that they are missing.
"""

import importlib.util
from typing import Final

__all__ = ["INSTALL", "LIBRARIES", "is_installed"]

LIBRARIES: Final = (
    "authlib",
    "cryptography",
    "httpx2",
    "itsdangerous",
    "jinja2",
    "joserfc",
    "starlette",
    "tinycss2",
    "uvicorn",
)
INSTALL: Final = (
    "install it from a clone of Latchkey with: "
    "pip install ./proto ./clients/python './clients/cli[console]'"
)


def is_installed() -> bool:
    """Return whether every library of the extra is installed."""
    return all(importlib.util.find_spec(name) is not None for name in LIBRARIES)
