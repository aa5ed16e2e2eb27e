"""The rules that the server and the client library share to answer verifies from a cache. Pure.

A verifier answers from its cache only under a lease, and a deletion waits until each verifier has
dropped the token or its lease has expired (Gray & Cheriton, 1989). Both sides use a `VerdictCache`,
and compute leases with the functions of `lease`. Begin with `verdict_cache.py`.

Owns no clock and no connection, and imports only the standard library. "Rule N" means rule N of
docs/protocol.md.

`identifiers.py`, `names.py` and `redaction.py` have nothing to do with caches. Service and clients
share them, too.
"""
