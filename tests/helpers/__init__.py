"""What tests of several kinds share. Each module is named for what it does."""
