"""The page of the Python API: the names that the client library exports, in the order of a reader.

mkdocstrings replaces each `:::` line with the signature and the docstring.
"""

import latchkey

__all__ = ["page"]

# Modules that users import besides `latchkey` itself.
MODULES = (
    "latchkey.sync",
    "latchkey.guards",
    "latchkey.guards.asgi",
    "latchkey.guards.fastapi",
    "latchkey.guards.wsgi",
    "latchkey.guards.django",
    "latchkey.guards.drf",
    "latchkey.guards.grpc",
    "latchkey.guards.grpc_sync",
)
FIRST = ("Client", "Verifier", "Access", "Scope", "Verdict", "Secret")


def page() -> str:
    """Return the page in Markdown."""
    rest = sorted(name for name in latchkey.__all__ if name not in FIRST and name[0] != "_")
    lines = ["# Python API", "", "Generated from the docstrings of the client library.", ""]
    lines += ["## latchkey", ""]
    lines += [f"::: latchkey.{name}\n" for name in (*FIRST, *rest)]
    for module in MODULES:
        lines += [f"::: {module}", "    options:", "      heading_level: 2", ""]
    return "\n".join(lines)
