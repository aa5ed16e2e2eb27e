"""Processes: the supervisor, its workers, and the wiring of one worker.

Owns what happens between `latchkey serve` and the first call, and from SIGTERM to the last one. No
room imports it.

Imports: transport, rpc, access, tokens, coherence, audit, postgres, settings.
Begin with `wiring.py`, which builds a worker.
"""
