"""Latchkey's command line tool, `latchkey`.

This package owns what people and scripts see: options, tables, JSON, prompts and exit codes. The
client library owns deadlines and retries, and the service makes every decision. This package never
imports the service: `serve`, `config` and `policy` replace this process with it.
"""

from latchkey_console import grpc_core

grpc_core.prepare()
