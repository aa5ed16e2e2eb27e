"""HTTP without TLS."""

import ssl
from typing import Final

__all__ = ["NO_AUTHORITIES"]

# For the argument `verify` of httpx. By default, each client, and each call without one, loads all
# certification authorities, which takes 20 ms.
NO_AUTHORITIES: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
