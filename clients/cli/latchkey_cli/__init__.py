"""Command line tool of Latchkey: `latchkey`.

It owns what people and scripts see: options, tables, JSON, prompts and exit codes. It does not own
deadlines and retries (the client library), nor anything that the service decides. It never imports
the service: `serve` and `config` replace this process by it.
"""
