#!/usr/bin/env bash
# What `make check` runs: lint, types, stubs, locks, security. Every step runs, each prints one line,
# and what a step has to say is shown when it fails. Exits 1 if any failed.
# Runs at the root of the repository, with the development environment's programs first in PATH.
set -uo pipefail

# The vulnerability data comes over the network, which may be slow, filtered or not there.
AUDIT_SECONDS=60

failed=()

# step NAME COMMAND...: run a command; exit code 0 is ok, and a last line "skipped: REASON" is told.
step() {
  local name=$1 output code
  shift
  output=$("$@" 2>&1 </dev/null)
  code=$?
  if ((code)); then
    printf '%-20s FAILED\n' "$name"
    sed 's/^/    /' <<<"$output"
    failed+=("$name")
  elif [[ ${output##*$'\n'} == skipped:* ]]; then
    printf '%-20s %s\n' "$name" "${output##*$'\n'}"
  else
    printf '%-20s ok\n' "$name"
  fi
}

proto_lint() {
  cd proto && buf lint
}

# What was resolved must say nothing of where it came from, and must cover what pyproject.toml asks.
locks() {
  python - <<'PYTHON'
import re
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PIN = re.compile(r"^([A-Za-z0-9][\w.-]*)==(\S+)", re.M)
ADDRESS = re.compile(r"://|\s@\s|^\s*(-i|-f|--index-url|--extra-index-url|--find-links|--trusted-host)\b", re.M)

complaints = []
pins = {}
for path in sorted(Path("requirements").glob("*.txt")):
    text = path.read_text()
    if found := ADDRESS.search(text):
        line = text.count("\n", 0, found.end()) + 1
        complaints.append(f"{path}:{line}: names an address; a lock file must work with any index")
    entries = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.M)
    for entry in entries:
        if PIN.match(entry) and "--hash=sha256:" not in entry:
            complaints.append(f"{path}: {entry.split()[0]} has no hash")
    pins[path.name] = {canonicalize_name(name): version for name, version in PIN.findall(text)}

project = tomllib.loads(Path("pyproject.toml").read_text())
extras = project["project"]["optional-dependencies"]
runtime = project["project"]["dependencies"]
build = [
    line for line in Path("requirements/build.in").read_text().splitlines()
    if line.strip() and not line.startswith("#")
]
wanted = {
    "run.txt": [*runtime, *(r for extra in extras.values() for r in extra), *build],
    "service.txt": [*runtime, *extras["service"], *extras["cli"]],
    "dev.txt": [*runtime, *project["dependency-groups"]["dev"]],
}
for name, requirements in wanted.items():
    for text in requirements:
        requirement = Requirement(text)
        version = pins.get(name, {}).get(canonicalize_name(requirement.name))
        if version is None:
            complaints.append(f"requirements/{name}: lacks {requirement.name}; run make lock")
        elif not requirement.specifier.contains(version, prereleases=True):
            complaints.append(f"requirements/{name}: {requirement.name} {version} is not {text}; run make lock")
for name in ("service.txt", "dev.txt"):
    for package, version in pins.get(name, {}).items():
        if (other := pins["run.txt"].get(package, version)) != version:
            complaints.append(f"requirements/{name}: {package} {version}, but {other} in run.txt")
print("\n".join(complaints))
sys.exit(bool(complaints))
PYTHON
}

# Known vulnerabilities fail the check; a source that cannot be reached or knows nothing does not.
audit() {
  local report errors code
  report=$(mktemp) errors=$(mktemp)
  timeout "$AUDIT_SECONDS" pip-audit --requirement requirements/run.txt --require-hashes --disable-pip \
    --timeout 10 --progress-spinner off --format json >"$report" 2>"$errors"
  code=$?
  python - "$code" "$report" "$errors" <<'PYTHON'
import json
import re
import sys
from pathlib import Path

code, report, errors = int(sys.argv[1]), Path(sys.argv[2]).read_text(), Path(sys.argv[3]).read_text()
UNREACHABLE = re.compile(
    r"ConnectionError|ConnectTimeout|ReadTimeout|timed out|Max retries exceeded|NameResolutionError"
    r"|SSLError|ProxyError|\b(?:403|407|429|5\d\d) (?:Client|Server) Error"
)
if code == 124:
    print("skipped: the source of vulnerability data did not answer in time")
    sys.exit()
try:
    packages = json.loads(report)["dependencies"]
except ValueError:
    if UNREACHABLE.search(errors):
        print("skipped: the source of vulnerability data cannot be reached")
        sys.exit()
    sys.exit(errors or report or f"pip-audit ended with exit code {code} and said nothing")
found = [
    f"{p['name']} {p['version']}: {v['id']} {' '.join(v.get('aliases', []))}, "
    f"fixed in {', '.join(v['fix_versions']) or 'no version yet'}"
    for p in packages
    for v in p.get("vulns", [])
]
if found:
    sys.exit("\n".join(found))
if code:
    sys.exit(errors or f"pip-audit ended with exit code {code}")
unknown = sum("skip_reason" in p for p in packages)
if unknown:
    print(f"skipped: the source of vulnerability data does not know {unknown} of {len(packages)} packages")
PYTHON
  code=$?
  rm -f "$report" "$errors"
  return "$code"
}

step "ruff check" ruff check --quiet .
step "ruff format" ruff format --check --quiet .
step "mypy" mypy proto/latchkey_coherence service/latchkey_service clients/python/latchkey \
  clients/cli/latchkey_cli clients/console/latchkey_console
step "mypy tests" mypy tests
step "imports" lint-imports --no-cache --no-logo
step "buf lint" proto_lint
step "stubs" python proto/generate.py --check
step "bandit" bandit --quiet --recursive proto/latchkey_coherence service clients --configfile pyproject.toml
step "locks" locks
step "pip-audit" audit

if ((${#failed[@]})); then
  printf -v names '%s, ' "${failed[@]}"
  echo "failed: ${names%, }" >&2
  exit 1
fi
