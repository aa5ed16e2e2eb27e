"""Entry point: `python -m latchkey_service [serve|config|policy|worker]`."""

import gc
import importlib
import json
import os
import sys
from collections.abc import Callable

if __name__ == "__main__":
    # These would take a third of the start. Nothing that imports create is garbage, and structlog
    # would load rich, if it is installed, for tracebacks in colour.
    gc.disable()
    sys.modules.setdefault("rich", None)  # type: ignore[arg-type]  # blocks the import

from latchkey_service.settings import loading

USAGE = """\
usage: python -m latchkey_service [serve | config [--json] | policy ... | dev-ca ... |
                                  migrate ... | doctor ... | audit verify ...]

  serve                    run the service (the default)
  config                   print the settings in force, passwords redacted
  policy new-caller NAME   print a new credential and its section for the policy file, or
                           append the section with --output FILE; --role and --account
  dev-ca [--help]          write a CA and certificates for trying TLS
  policy check [FILE]      validate a policy file, by default LATCHKEY_POLICY
  migrate [--check | --dry-run] [--grant ROLE] [--database-url-file FILE]
                           bring the database to this release, as the owner of its tables,
                           and give the role of the service its rights
  doctor [--json] [--host NAME] [--ca FILE]
                           check this host's settings, files, database and addresses
  audit verify [--noted NUMBER:DIGEST]
                           check that no sealed entry of the audit log was changed or removed
"""


# Commands that parse their own arguments: the module and the function of each.
_TOOLS = {
    "audit": ("latchkey_service.process.commands", "audit_command"),
    "doctor": ("latchkey_service.process.doctor", "run"),
    "dev-ca": ("latchkey_service.access.dev_ca", "run"),
    "migrate": ("latchkey_service.process.commands", "migrate_command"),
    "policy": ("latchkey_service.access.command", "run"),
}


def main(arguments: list[str]) -> int:
    """Run the command and return the exit code: 2 for an invalid setting or argument."""
    command = arguments[0] if arguments else "serve"
    if command in ("-h", "--help"):
        print(USAGE, end="")  # noqa: T201
        return 0
    # Imports are local, so that `config` need not load everything that `serve` needs.
    if command in _TOOLS:
        module, function = _TOOLS[command]
        run: Callable[[list[str]], int] = getattr(importlib.import_module(module), function)
        return run(arguments[1:])
    try:
        if arguments == ["worker"]:
            from latchkey_service.process import worker

            _collect_garbage()
            return worker.main()
        settings = loading.load()
    except loading.ConfigError as error:
        print(f"latchkey: invalid settings:\n{error}", file=sys.stderr)  # noqa: T201
        return 2
    if arguments in ([], ["serve"]):
        from latchkey_service.process import supervisor

        _collect_garbage()
        return supervisor.run(settings)
    if command == "config" and arguments[1:] in ([], ["--json"]):
        rows = loading.describe(settings)
        if arguments[1:]:
            print(json.dumps({name: value for name, value, _, _ in rows}, indent=2))  # noqa: T201
        else:
            for name, value, source, description in rows:
                print(f"{name}={value}\n    {description} ({source})")  # noqa: T201
        return 0
    print(f"latchkey: unknown command\n{USAGE}", end="", file=sys.stderr)  # noqa: T201
    return 2


def _collect_garbage() -> None:
    """Collect garbage from now on, except among the modules, which stay."""
    gc.freeze()
    gc.enable()


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # `config | head`: the reader has closed the pipe. Python would report that again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)
