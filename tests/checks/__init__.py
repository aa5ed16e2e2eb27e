"""What `make check` runs: style, types, contract, lock files, known vulnerabilities.

Begin with `__main__.py`, which lists the steps.
"""
