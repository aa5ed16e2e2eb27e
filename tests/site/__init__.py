"""`make docs`: builds the documentation site from the repository's Markdown, without a network."""
