"""What server and client library must agree on to answer verifies from memory. Pure.

A verifier answers from memory only under a lease, and a deletion waits until each verifier has
dropped the token or its lease has run out (Gray & Cheriton, 1989). Both sides keep a `Memory`, and
both count leases with the functions of `lease`. Neither has a clock or talks to anyone.

"Rule N" means rule N of docs/protocol.md.
"""
