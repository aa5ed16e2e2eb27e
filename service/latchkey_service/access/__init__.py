"""Who may call: what a call presents, the policy, and the decision, the same on every listener.

`methods` has the table of all methods and who may call them. `policy` reads the policy file,
`policy_file` follows it. `identity` reads what a call presents, with `certificate` for the
names in one, `forwarded` for what a proxy says, and `credentials` for the form of bearer
credentials. `gate` puts it together: one `Door` for each listener, whose `admit` every call goes
through (`calls.py`).
"""
