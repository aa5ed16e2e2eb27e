"""Tokens: creates, lists, deletes and verifies them, with their secrets, peppers and SQL.

Owns the rules of the contract, but neither protobuf (`rpc`) nor leases (`coherence`). Counts the
uses of tokens (`usage`) and writes them (`usage_writer`, `usage_table`).

Imports: coherence, audit, postgres, settings.
Begin with `verifier.py` for Verify, with `management.py` for Create, Get, List and Delete, and with
`lifecycle.py` for changes to a token.
"""
