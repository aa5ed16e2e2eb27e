"""Processes: the supervisor, its workers, and how one worker is put together.

Owns what happens between `latchkey serve` and the first call, and from SIGTERM to the last one. No
room imports it.

Imports: transport, rpc, access, tokens, coherence, audit, postgres, settings.
Begin with `wiring.py`, which builds a worker.
"""
