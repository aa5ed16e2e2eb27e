"""Listeners: HTTP/2 by `native` or grpcio, TLS, and the limits of each connection.

Owns what happens to bytes before a call reaches its handler. From access it takes the names
of methods.

Imports: access, settings.
Begin with `transports.py`, the one seam between the two.
"""
