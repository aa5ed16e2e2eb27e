"""The part of a call's context that the service uses. Both transports provide it."""

from collections.abc import Sequence
from typing import Protocol

import grpc

from latchkey_service.access.authenticator import HasMetadata

__all__ = ["CallContext"]


class CallContext(HasMetadata, Protocol):
    """One call, as its transport sees it."""

    def peer(self) -> str:
        """Return the address of the peer, such as `ipv4:127.0.0.1:4711`."""
        ...

    def time_remaining(self) -> float | None:
        """Return the seconds until the deadline; None or a huge number means no deadline."""
        ...

    def set_code(self, code: grpc.StatusCode) -> None:
        """Set the code of the call's status."""
        ...

    def set_details(self, details: str) -> None:
        """Set the message of the call's status."""
        ...

    def set_trailing_metadata(self, trailing_metadata: Sequence[tuple[str, str | bytes]]) -> None:
        """Set the metadata that is sent with the call's status."""
        ...
