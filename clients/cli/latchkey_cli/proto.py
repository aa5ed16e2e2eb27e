"""The command `proto`, which prints the contract for tools that read descriptor sets."""

import sys
from importlib import resources
from typing import Final

from latchkey_cli import output
from latchkey_cli.failures import Exit, Failure

__all__ = ["proto"]

_SET: Final = "latchkey.binpb"


def proto() -> None:
    """Write the contract to standard output as a protobuf descriptor set.

    Tools read it where the server's reflection is off, for example:
    latchkey proto > latchkey.binpb
    grpcurl -protoset latchkey.binpb describe latchkey.v1.TokenService

    It contains the types of google.rpc, so that grpcurl prints error details.
    """
    if output.is_terminal(sys.stdout):
        raise Failure(
            "refused to print binary data on a terminal",
            f"redirect it: latchkey proto > {_SET}",
            Exit.USAGE,
            code="USAGE",
        )
    content = resources.files("latchkey_proto").joinpath(_SET).read_bytes()
    output.write_bytes(sys.stdout, content)
