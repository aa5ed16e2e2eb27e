"""Postgres: connections and their bounds, the hosts of a URL, migrations, the embedded cluster.

Owns the driver: its errors are translated here, and every wait for Postgres has a bound from here.

Imports: settings.
Begin with `connections.py`.
"""
