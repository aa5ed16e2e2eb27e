"""The Latchkey server. Start with docs/architecture.md: its rooms, and the way of a call."""
