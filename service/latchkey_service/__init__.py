"""The Latchkey server. `rpc.py` says how one Verify goes from socket to answer: start there."""
