"""Tokens: create, list, delete and verify them; their peppers and their SQL.

Owns the rules of the contract.

Imports: coherence, audit, postgres.
Begin with `verifier.py` for a verify and `management.py` for everything else.
"""
