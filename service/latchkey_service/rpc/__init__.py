"""Calls: what every call goes through, and the servicers that turn protobuf into domain calls.

Owns admission, deadlines, error statuses and reports of calls. Besides this room, only access uses
protobuf; pyproject.toml lists the exceptions.

Imports: access, tokens, coherence, audit, settings.
Begin with `token_service.py`, which describes one Verify from socket to answer.
"""
