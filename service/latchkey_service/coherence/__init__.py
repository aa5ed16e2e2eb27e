"""The coherence protocol: once Delete returns, no verifier accepts the token.

Owns leases, the log of invalidations, acknowledgements, watch sessions and the verifiers' table.
It does not own tokens, and knows only their ids.

Pure, with the clock passed in:
- `verifier_state`: this process as a verifier (its cache, lease and row).
- `client_leases`: the clients that answer under its lease.
- `ack_rules`: when a Delete may return, and which verifiers are dead.
- `snapshot`: where a read was taken.
- `host_lead`: how the lead of a host shares its lease. `recent_log` keeps the log for that.

Around them:
- `lease_renewer` registers, renews the lease and reads the log. `notify_listener` wakes it, and
  `dead_rows` removes the rows of dead processes for it.
- `watch_sessions` serves clients; each session is pure. `watch_events` defines the messages, and
  `use_reports` limits the reports of uses.
- `ack_waiter` lets Deletes wait.
- `reads` decides which reads of the database to accept.
- `primary` follows the primary server.
- `verifier_table` contains the SQL, `rows` the row of a process in Postgres.
- `host_rows` is the row of a sibling, at the lead of its host: `lead_client`, `lead_server`.

"Rule N" means rule N of docs/protocol.md, here and in the rest of the service.

Imports: postgres, settings.
Begin with `verifier_state.py` and `lease_renewer.py`, after docs/protocol.md.
"""
