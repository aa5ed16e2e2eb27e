"""The audit log: which caller managed tokens, or tried to.

Owns the audit table, and which failed calls are recorded when they are frequent.

Imports: coherence, postgres, settings.
Begin with `audit_log.py`.
"""
