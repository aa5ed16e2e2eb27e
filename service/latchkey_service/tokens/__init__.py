"""Tokens: create, list, delete and verify them; their secrets, peppers and SQL.

Owns the rules of the contract. Imports coherence (leases), audit and postgres. Begin with
`verifier.py` for a verify and `management.py` for everything else.
"""
