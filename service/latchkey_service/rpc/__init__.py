"""Calls: their paths through the service, and the servicers that turn protobuf into domain calls.

Owns admission, deadlines, error statuses and reports of calls. Besides this room, only access uses
protobuf; pyproject.toml lists the exceptions.

Imports: access, tokens, coherence, audit, settings.
Begin with `handlers.py`, which puts each method on its path: `verify_calls.py` contains all of a
Verify, `managed_calls.py` and `streams.py` wrap the servicers.
"""
