"""Latchkey's web console, where people create, view, review and delete their account's API tokens.

This package owns what a browser sees: pages, forms, sign-in, and the single display of a new
secret. It does not own tokens: it is a thin client of TokenService through the client library
`latchkey`. Browsers keep the state of a visit, sealed with a key that several processes can share
(`state`). A process itself remembers only the sessions that ended early (`ended`) and the secrets
that it has displayed (`showing`).
"""

from latchkey_console import grpc_core

grpc_core.prepare()
