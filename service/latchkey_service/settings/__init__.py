"""Settings, where data is kept, and logs.

Owns the environment variables: their names, defaults and checks.

Imports: no other room.
Begin with `settings.py`.
"""
