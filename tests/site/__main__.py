"""Builds the site into build/site. Run it as `make docs`, or as `python -m tests.site`."""

import sys

from tests.checks.steps import ROOT, State
from tests.site.build import build

if __name__ == "__main__":
    outcome = build(ROOT)
    if outcome.state is not State.OK:
        sys.stderr.write(f"{outcome.text}\n")
        sys.exit(1)
    sys.stdout.write(
        "Open build/site/index.html. Its search needs a web server, such as\n"
        "  python3 -m http.server --bind 127.0.0.1 --directory build/site\n"
    )
