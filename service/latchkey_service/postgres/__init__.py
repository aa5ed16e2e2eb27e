"""Postgres: connections and their bounds, the hosts of a URL, migrations, the embedded cluster.

Owns the driver: this room translates its errors and bounds every wait for Postgres. It does not own
the SQL of tokens, verifiers and audit entries.

Imports: settings.
Begin with `connections.py`.
"""
