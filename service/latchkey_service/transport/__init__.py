"""Listeners: HTTP/2 by `native` or grpcio, TLS, and the limits of each connection.

Owns what happens to bytes before a call reaches its handler. Imports access, tokens (the queue
limit), rpc (method names) and settings. Begin with `transports.py`, the one seam between the two.
"""
