"""Postgres: connections and their bounds, the hosts of a URL, migrations, the embedded cluster.

Owns the driver: its errors are translated here, and no other room waits for Postgres without a
bound from here. Imports settings. Begin with `connections.py`.
"""
