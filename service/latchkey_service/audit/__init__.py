"""The audit log: who managed tokens, or tried to.

Owns the audit table and how entries are sampled. Imports postgres and settings. Begin with
`audit_log.py`.
"""
