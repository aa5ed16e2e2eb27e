"""Generated from proto/latchkey; `make proto` writes it."""
