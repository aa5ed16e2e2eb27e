"""Callers: who calls, and what the policy allows, the same on every listener.

Owns identities, credentials of callers, the policy file and rates. `methods` lists every method and
the role that may call it. `policy` parses the policy file, and `policy_file` reloads it. `identity`
maps the presented credentials to a caller, with the help of `certificate` (subject alternative
names), `forwarded` (a proxy's header) and `credentials` (the format of bearer credentials).

Imports: settings.
Begin with `authenticator.py`: every call on a listener with a policy passes its `authorize`.
"""
