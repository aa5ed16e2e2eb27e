"""What the server and the client library must agree on to answer verifies from a cache. Pure.

A verifier answers from its cache only under a lease, and a deletion waits until each verifier has
dropped the token or its lease has expired (Gray & Cheriton, 1989). Both sides keep a
`VerdictCache`, and both count leases with the functions of `lease`. Begin with `verdict_cache.py`.

Owns no clock and no connection, and imports only the standard library. "Rule N" means rule N of
docs/protocol.md.
"""
