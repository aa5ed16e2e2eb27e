"""When Delete returns, the token is dead everywhere: leases, the log, and who waits for whom.

Pure, with the clock passed in: `membership` (this process as a verifier), `subleases` (its
clients), `confirmation` (what a Delete waits for, and which verifiers are dead). What drives them:
`heart` renews and reads the log, `notifications` wakes it, `watch` serves clients, `confirmer`
waits. `table` has the SQL.

"Rule N" means rule N of docs/protocol.md, here and in the rest of the service.
"""
