"""Latchkey's web console, where people create, view, review and delete their account's API tokens.

This package owns what a browser sees: pages, forms, sign-in, and the single display of a new
secret. It does not own tokens: it is a thin client of TokenService through the client library
`latchkey`. It stores only what the next request of the same browser needs, and only in memory.
Therefore exactly one process serves the page: several would not know each other's forms.
"""

from latchkey_console import grpc_core

grpc_core.prepare()
