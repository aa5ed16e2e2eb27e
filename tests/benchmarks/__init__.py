"""Measures; `__main__` is `make bench`."""

import os

# Before grpcio is loaded, which reads it then: processes are started here while connections are
# open, none is a copy of this one that goes on with them, and it would warn of each.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
