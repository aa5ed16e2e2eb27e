"""When Delete returns, the token is dead everywhere: leases, the log, and who waits for whom.

Pure, with the clock passed in: `state` (this process as a verifier), `client_leases` (its
clients), `confirmation` (what a Delete waits for, and which verifiers are dead). What drives them:
`renewer` renews and reads the log, `notifications` wakes it, `watch` serves clients, `ack_waiter`
waits. `table` has the SQL.

"Rule N" means rule N of docs/protocol.md, here and in the rest of the service.
"""
