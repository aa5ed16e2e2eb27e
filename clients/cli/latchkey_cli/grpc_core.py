"""The environment for gRPC's core, which reads these variables once, when it loads.

`main` sets them before any command runs, because each command may load gRPC.
"""

import os
from typing import Final

__all__ = ["ENVIRONMENT"]

ENVIRONMENT: Final = {
    # TLS 1.3 only. gRPC has no setting for the version. This one affects only TLS 1.2, and the only
    # cipher named here requires a pre-shared key, which no server has. The client library cannot
    # set it: it would change the other gRPC connections of its users' programs.
    "GRPC_SSL_CIPHER_SUITES": "ECDHE-PSK-AES128-CBC-SHA",
    # The core would write log lines to standard error.
    "GRPC_VERBOSITY": os.environ.get("GRPC_VERBOSITY", "NONE"),
}
