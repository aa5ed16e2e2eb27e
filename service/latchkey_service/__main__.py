"""Entry point: `python -m latchkey_service [serve|config|policy|worker]`."""

import json
import os
import sys

from latchkey_service import config

USAGE = """\
usage: python -m latchkey_service [serve | config [--json] | policy ...]

  serve                    run the service (the default)
  config                   print the settings in force, passwords redacted
  policy new-caller NAME   print a new credential, and what the policy file has of it
  policy check [FILE]      say whether a policy file, by default LATCHKEY_POLICY, is right
"""


def main(arguments: list[str]) -> int:
    """Do what the arguments say and return the exit code: 2 for a wrong setting or argument."""
    command = arguments[0] if arguments else "serve"
    if command == "policy":
        from latchkey_service.access import command as policy_command

        code = policy_command.run(arguments[1:])
        if code is None:
            print(USAGE, end="", file=sys.stderr)  # noqa: T201
        return 2 if code is None else code
    # Imported where needed: `config` must not wait for what `serve` loads.
    try:
        if arguments == ["worker"]:
            from latchkey_service import worker

            return worker.main()
        settings = config.load()
    except config.ConfigError as error:
        print(f"latchkey: these settings are wrong:\n{error}", file=sys.stderr)  # noqa: T201
        return 2
    if arguments in ([], ["serve"]):
        from latchkey_service import supervisor

        return supervisor.run(settings)
    if command == "config" and arguments[1:] in ([], ["--json"]):
        rows = config.describe(settings)
        if arguments[1:]:
            print(json.dumps({name: value for name, value, _, _ in rows}, indent=2))  # noqa: T201
        else:
            for name, value, source, description in rows:
                print(f"{name}={value}\n    {description} ({source})")  # noqa: T201
        return 0
    print(USAGE, end="", file=sys.stderr)  # noqa: T201
    return 2


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # `config | head`: nobody reads on. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)
