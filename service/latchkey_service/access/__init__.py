"""Caller identity and authorization, the same on every listener.

Start with `gate`: one `Authenticator` for each listener; every call passes its `authorize`
(`calls.py`). `methods` lists every method and the role that may call it. `policy` parses the policy
file and `policy_file` reloads it. `identity` maps the presented credentials to a caller, with the
help of `certificate` (subject alternative names), `forwarded` (a proxy's header) and `credentials`
(the format of bearer credentials).
"""
