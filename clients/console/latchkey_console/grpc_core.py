"""The environment for gRPC's core, which reads these variables once, when it loads.

Both packages of this distribution call `prepare` when they are imported, so it runs before any of
their modules can load gRPC, whatever starts first: the command line, `make console`, or a script.
"""

import os
from typing import Final

__all__ = ["for_the_service", "prepare"]

_ENVIRONMENT: Final = {
    # TLS 1.3 only. gRPC has no setting for the version. This one affects only TLS 1.2, and the only
    # cipher named here requires a pre-shared key, which no server has. The client library cannot
    # set it: it would change the other gRPC connections of its users' programs.
    "GRPC_SSL_CIPHER_SUITES": "ECDHE-PSK-AES128-CBC-SHA",
    # The core would write log lines to standard error.
    "GRPC_VERBOSITY": os.environ.get("GRPC_VERBOSITY", "NONE"),
}
# The values of the user's environment, or None for a variable that was not set.
_BEFORE: Final = {name: os.environ.get(name) for name in _ENVIRONMENT}


def prepare() -> None:
    """Set the variables."""
    os.environ.update(_ENVIRONMENT)


def for_the_service() -> dict[str, str]:
    """Return the user's environment, because the service decides by itself what gRPC may do."""
    found = dict(os.environ)
    for name, value in _BEFORE.items():
        if value is None:
            found.pop(name, None)
        else:
            found[name] = value
    return found
