"""The documents are true: settings, the secret's pattern, links, and the test of each code
block."""

import os
import re
import subprocess
import sys
from datetime import timedelta
from fnmatch import fnmatch
from pathlib import Path

import pytest
from latchkey_service.access.credentials import digest_of
from latchkey_service.access.methods import METHODS, ROLES
from latchkey_service.access.policy import parse
from latchkey_service.secret_format import Keyring, Pepper
from latchkey_service.settings.data_dir import default_data_dir
from latchkey_service.settings.settings import Settings
from packaging.requirements import Requirement
from pydantic_core import PydanticUndefined

from tests.checks.distributions import distributions, version
from tests.helpers.environments import declared_by
from tests.helpers.repository import ROOT

README = (ROOT / "README.md").read_text("utf-8")
SETTINGS = (ROOT / "docs/settings.md").read_text("utf-8")
LIBRARY = (ROOT / "clients/python/README.md").read_text("utf-8")
README_LINES_MAX = 200
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "clients/**/README.md", "proto/**/*.md")
    for path in ROOT.glob(pattern)
)
OFFLINE = "--quiet --disable-pip-version-check --no-index --no-build-isolation"
# Each has a test below, in integration/docs/test_readme_grpcurl.py or in console/test_running.py.
MARKS = {
    "cli",
    "config",
    "console",
    "grpcurl",
    "grpcurl install",
    "guard calls",
    "guard server",
    "make console",
    "make run",
    "policy",
    "python",
    "python asgi guard",
    "python metrics",
    "regex",
    "wheel",
}


def test_settings_table() -> None:
    """The table lists every setting, in order, with its default and meaning."""
    rows = re.findall(r"^\| `(LATCHKEY_\w+)` \| (.+?) \| (.+) \|$", SETTINGS, re.MULTILINE)
    expected = []
    for name, field in Settings.model_fields.items():
        if field.default is PydanticUndefined:
            default = "the user's data directory"
        else:
            default = "none" if field.default is None else f"`{field.default}`"
        expected.append((f"LATCHKEY_{name.upper()}", default, field.description))
    assert rows == expected


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="the document names Linux's directories")
def test_data_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    """The document names the directories that hold data."""
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    theirs = str(default_data_dir()).replace("/home/someone", "~")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    roots = default_data_dir()
    assert f"is `{theirs}` on Linux, and `{roots}` for root" in SETTINGS


def test_scanner_pattern() -> None:
    """The scanners' pattern finds a secret in a text: all of it, and nothing longer or shorter."""
    match = re.search(r"<!-- test: regex -->\n```text\n(.+)\n```", SETTINGS)
    assert match is not None
    pattern = re.compile(match[1])
    for number in range(100):
        minted = Keyring([Pepper(bytes([number]) * 32)]).mint("lk", os.urandom)
        secret = minted.secret.reveal()
        assert pattern.findall(f'TOKEN="{secret}", {secret}.') == [secret, secret]
        assert not pattern.search(secret[:-1])
        assert not pattern.search(secret + "0")


def test_every_block_is_run() -> None:
    """Each code block of the README and of the settings is marked with the test that runs it."""
    marks = set(re.findall(r"^<!-- test: (.+) -->\n```", LIBRARY, re.MULTILINE))
    for text in (README, SETTINGS):
        fences = len(re.findall(r"^```\w*$", text, re.MULTILINE))
        marked = re.findall(r"^<!-- test: (.+) -->\n```", text, re.MULTILINE)
        assert fences == 2 * len(marked)
        marks |= set(marked)
    assert marks == MARKS


def test_readme_is_short() -> None:
    """The README stays short enough to read; details go to docs/."""
    assert len(README.splitlines()) <= README_LINES_MAX


def test_policy() -> None:
    """The documented policy is valid and matches the text around it; the table of roles matches the
    service."""
    text = (ROOT / "docs/callers.md").read_text("utf-8")
    match = re.search(r"<!-- test: policy -->\n```toml\n(.+?)```", text, re.DOTALL)
    assert match is not None
    policy = parse(match[1])
    assert policy.callers == {"shop", "team-red", "portal"}
    limit = policy.certificates["portal.internal"].lifetimes.limit
    assert [limit(account).max_ttl for account in ("acme", "red-1")] == [
        timedelta(days=90),
        timedelta(days=30),
    ]
    for role in ROLES:
        row = re.search(rf"^ *\| `{role}` \| (.+) \|$", text, re.MULTILINE)
        assert row is not None, role
        named = {name.rpartition(".")[2] for name in re.findall(r"`(.+?)`", row[1])}
        methods = {path for path, rule in METHODS.items() if rule.role == role}
        assert named == {path.rpartition("/")[2] for path in methods}
    parsed = policy.certificates["spiffe://example.org/shop"]
    assert parsed.rates is not None
    assert (parsed.rates.per_second, parsed.watches_max) == ({"verifier": 5000}, 200)


def test_new_caller(tmp_path: Path) -> None:
    """The README's commands for a first caller create a valid credential file and policy. No other
    user may read them, git ignores them, and a second run changes nothing."""
    blocks = re.findall(r"<!-- test: policy -->\n```bash\n(.+?)```", README, re.DOTALL)
    command = blocks[0].replace(".venv/bin/latchkey", f"{sys.executable} -m latchkey_cli")
    subprocess.run(["bash", "-ec", command], cwd=tmp_path, check=True, timeout=60)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert made.keys() == {"shop.credential", "policy.toml"}
    caller = parse(made["policy.toml"]).credentials.get(digest_of(made["shop.credential"].strip()))
    assert caller is not None
    assert caller.name == "shop"
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    ignored = (ROOT / ".gitignore").read_text("utf-8").splitlines()
    assert all(any(fnmatch(name, pattern) for pattern in ignored) for name in made)
    again = subprocess.run(
        ["bash", "-ec", command], cwd=tmp_path, check=False, timeout=60, capture_output=True
    )
    assert again.returncode != 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == made


def test_wheel(tmp_path: Path) -> None:
    """The documented wheels contain the client library and the stubs, which depend only on gRPC."""
    (command,) = re.findall(r"<!-- test: wheel -->\n```bash\n(.+?)```", LIBRARY, re.DOTALL)
    # With the installed build tool, because a test must not depend on an index.
    command = command.replace(".venv/bin/pip wheel", f"{sys.executable} -m pip wheel {OFFLINE}")
    command = command.replace("--wheel-dir dist", f"--wheel-dir {tmp_path}")
    subprocess.run(["bash", "-ec", command], cwd=ROOT, check=True, timeout=60)
    wheels = sorted(tmp_path.iterdir())
    assert [wheel.name.partition("-")[0] for wheel in wheels] == [
        "latchkey_client",
        "latchkey_proto",
    ]
    declared = [Requirement(text) for wheel in wheels for text in declared_by(wheel)]
    needed = {r.name for r in declared if r.marker is None or r.marker.evaluate({"extra": ""})}
    assert needed == {"latchkey-proto", "googleapis-common-protos", "grpcio", "protobuf"}


def test_nothing_installs_by_index_name() -> None:
    """No document and no message installs Latchkey or one of its distributions by name. On the
    public index, one name belongs to another project, and anyone may register the others."""
    files = [
        path
        for folder in (".", "docs", "clients", "service", "proto")
        for ending in ("md", "py", "html", "toml", "proto")
        for path in (ROOT / folder).glob(f"*.{ending}" if folder == "." else f"**/*.{ending}")
    ]
    assert len(files) > 100
    names = "|".join(["latchkey", *(member.name for member in distributions(ROOT))])
    by_name = re.compile(
        rf"install(?:[ \t]+\S+)*?[ \t]+['\"]?(?:{names})(?:[\[=<>~!]\S*)?['\"]?(?=[\s`).,;]|$)"
    )
    for command in ("latchkey", "-q x 'latchkey-cli[console]'", "latchkey-service==1", "latchkey."):
        assert by_name.search(f"pip install {command}")
    for path in files:
        found = by_name.search(path.read_text("utf-8"))
        assert found is None, (path, found)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links(name: str) -> None:
    """Every link of a document into the repository leads to an existing file and heading."""
    path = ROOT / name
    for target, heading in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", path.read_text("utf-8")):
        if target.startswith("https://"):
            continue
        document = path.parent / target if target else path
        assert document.exists(), target
        if heading:
            assert heading in anchors(document.read_text("utf-8")), (target, heading)


def anchors(text: str) -> set[str]:
    """Return the link names of a document's headings."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_make_targets() -> None:
    """CONTRIBUTING names only commands that the Makefile has."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    contributing = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    for target in re.findall(r"`make (\w+)", contributing):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_layout() -> None:
    """The directories and modules that CONTRIBUTING names exist."""
    contributing = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    rows = re.findall(r"^\| `([\w/]+/)` \| (.+) \|$", contributing, re.MULTILINE)
    assert len(rows) > 10
    for folder, text in rows:
        assert (ROOT / folder).is_dir(), folder
        for module in re.findall(r"`([\w/]+\.py)`", text):
            assert (ROOT / folder / module).is_file(), (folder, module)
    # Upper-case names are placeholders.
    for path in re.findall(r"`((?:proto|service|clients|tests|docs)/[a-z0-9_./-]+)`", contributing):
        assert (ROOT / path).exists(), path


def test_rooms_are_described() -> None:
    """CONTRIBUTING and the architecture page list every room of the service."""
    rooms = {path.parent.name for path in (ROOT / "service/latchkey_service").glob("*/__init__.py")}
    contributing = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    architecture = (ROOT / "docs/architecture.md").read_text("utf-8")
    listed = set(
        re.findall(r"^\| `service/latchkey_service/(\w+)/` \|", contributing, re.MULTILINE)
    )
    assert listed == rooms
    section = architecture.partition("\n## Rooms\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)/` \|", section, re.MULTILINE)) == rooms


def test_changelog() -> None:
    """The changelog begins with the unreleased version; each version below has a date. The version
    in pyproject.toml is one of them, or is the next one. Each version has one list of a kind."""
    next_version = version(ROOT)
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    first, *sections = re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]
    assert first.startswith("[Unreleased]\n")
    versions = [re.match(r"\[(.+)\] - \d{4}-\d\d-\d\d\n", section) for section in sections]
    assert all(versions)
    assert next_version in [found[1] for found in versions if found] or (
        f"\nNothing is released yet; this will be {next_version}.\n" in first
    )
    for section in (first, *sections):
        kinds = re.findall(r"^### (.+)$", section, re.MULTILINE)
        assert len(kinds) == len(set(kinds)), kinds


def test_the_threat_model_names_existing_tests() -> None:
    """Every test that SECURITY.md names exists."""
    named = re.findall(r"`(tests/[^`]*)`", (ROOT / "SECURITY.md").read_text("utf-8"))
    assert len(named) > 10
    assert [path for path in named if not (ROOT / path).exists()] == []
