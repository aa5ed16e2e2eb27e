"""Calls: what every call goes through, and the servicers that turn protobuf into domain calls.

Owns admission, deadlines, error statuses and reports of calls. Imports access, audit, coherence,
tokens and settings; of the service's rooms, only this one and access know protobuf. Begin with
`token_service.py`, which describes one Verify from socket to answer.
"""
