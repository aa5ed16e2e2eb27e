"""The protocol: when Delete returns, the token is dead everywhere.

Owns leases, the log and acknowledgements. These modules are pure, with the clock passed in:
`verifier_state` (this process as a verifier), `client_leases` (its clients) and `ack_rules` (what a
Delete waits for, and which verifiers are dead). `notify_listener` wakes the renewer,
`watch_sessions` serves clients, and `ack_waiter` waits for Deletes. `verifier_table` has the SQL.

"Rule N" means rule N of docs/protocol.md, here and in the rest of the service.

Imports: postgres, settings.
Begin with `lease_renewer.py`, which renews the lease and reads the log.
"""
