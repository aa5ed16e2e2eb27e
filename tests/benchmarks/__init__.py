"""Benchmarks; `__main__` is `make bench`."""

import os

# Set before grpcio is loaded, which reads it then. The benchmarks start processes while connections
# are open; none of them is a fork that uses those connections, but grpcio would warn about each.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
