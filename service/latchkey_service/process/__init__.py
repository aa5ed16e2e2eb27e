"""Processes: the supervisor, its workers, and how one worker is put together.

Owns what happens between `latchkey serve` and the first call, and from SIGTERM to the last one.
May import every other room; no room imports it. Begin with `wiring.py`, which builds a worker.
"""
