"""The Latchkey server. Start with docs/architecture.md: rooms, and how calls pass through them."""
