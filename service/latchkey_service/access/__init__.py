"""Callers: who calls, and what the policy allows, the same on every listener.

Owns identities, credentials of callers, the policy file and rates. `methods` lists every method,
the role that may call it, and the size limit of its requests. `policy` parses the policy file, and
`policy_file` reloads it. `credentials` reads bearer credentials. `identity` maps the names in a
certificate to a caller; they come from `certificate` or from `forwarded` (a proxy's header).

Imports: settings.
Begin with `authenticator.py`: every call on a listener with a policy passes its `authorize`.
"""
