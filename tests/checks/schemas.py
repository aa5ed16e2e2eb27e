"""Checks the files that GitHub and Docker read against their schemas, which need no network."""

import json
import sys
from pathlib import Path

from tests.checks.steps import Outcome, State, command, failed, ok

__all__ = ["SCHEMAS", "check"]

# The glob of the files, and the name of the schema that check-jsonschema ships.
SCHEMAS = {
    ".github/workflows/*.yml": "vendor.github-workflows",
    ".github/dependabot.yml": "vendor.dependabot",
    "docker-compose*.yml": "vendor.compose-spec",
}
# Checks each kind of file in one process, because importing check-jsonschema takes half a second.
# It would take a second longer to build the parser of IRIs, a format that these schemas do not use.
PROGRAM = """
import json, sys
sys.modules["rfc3987_syntax"] = None
from check_jsonschema import main

arguments = json.loads(sys.argv[1])
sys.exit(any([main(each, standalone_mode=False) for each in arguments]))
"""


def check(root: Path) -> Outcome:
    """Check each file below `root` against its schema."""
    found, arguments = [], []
    for pattern, schema in SCHEMAS.items():
        files = sorted(map(str, root.glob(pattern)))
        if not files:
            found.append(f"no file matches {pattern}")
            continue
        arguments.append(["--builtin-schema", schema, *files])
    if arguments:
        outcome = command(sys.executable, "-c", PROGRAM, json.dumps(arguments))
        if outcome.state is not State.OK:
            found.append(outcome.text)
    return failed("\n".join(found)) if found else ok()
