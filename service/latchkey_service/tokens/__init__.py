"""Tokens: creates, lists, deletes and verifies them, with their secrets, peppers and SQL.

Also counts the uses of tokens (`usage`) and writes them (`usage_writer`, `usage_table`).

Owns the rules of the contract, but neither protobuf (`rpc`) nor leases (`coherence`).

Imports: coherence, audit, postgres, settings.
Begin with `verifier.py` for Verify, with `management.py` for Create, Get, List and Delete, and with
`lifecycle.py` for the changes of a token.
"""
