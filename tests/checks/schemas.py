"""Checks the files that GitHub and Docker read against their schemas, which need no network."""

from pathlib import Path

from tests.checks.steps import Outcome, State, command, failed, ok

__all__ = ["SCHEMAS", "check"]

# The glob of the files, and the name of the schema that check-jsonschema ships.
SCHEMAS = {
    ".github/workflows/*.yml": "vendor.github-workflows",
    ".github/dependabot.yml": "vendor.dependabot",
    "docker-compose*.yml": "vendor.compose-spec",
}


def check(root: Path) -> Outcome:
    """Check each file below `root` against its schema."""
    found = []
    for pattern, schema in SCHEMAS.items():
        files = sorted(map(str, root.glob(pattern)))
        if not files:
            found.append(f"no file matches {pattern}")
            continue
        outcome = command("check-jsonschema", "--builtin-schema", schema, *files)
        if outcome.state is not State.OK:
            found.append(outcome.text)
    return failed("\n".join(found)) if found else ok()
