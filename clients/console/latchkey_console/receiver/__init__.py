"""The receiver of leak reports, in the shape of GitHub's secret scanning partner program.

Owns the HTTP endpoint to which a scanner posts the secrets that it has found. Revokes or marks them
through the client library, as a caller with the role `revoker`. Begin with `app.py`; the keys that
sign reports are in `keys.py`. It is a process beside the console, and uses its bounds.
"""
