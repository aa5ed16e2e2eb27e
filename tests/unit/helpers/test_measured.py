"""Which tests count for coverage. `make test` measures a small suite here."""

import re
import subprocess
import sys
from pathlib import Path

from tests.helpers import measured

# A few small tests, of which two start an interpreter.
SECONDS = 60.0
# By path, because that suite's folder is called `tests` too.
CONFTEST = f"""
import runpy
pytest_runtest_protocol = runpy.run_path({measured.__file__!r})["pytest_runtest_protocol"]
"""
# Each function is called by one test, in its process or in one that it starts.
NAMES = (
    *("counted", "not_counted", "counted_child", "not_counted_child", "counted_again"),
    *("on_native", "on_grpcio"),
)
LIBRARY = "".join(f"def {name}():\n    return '{name}'\n" for name in NAMES)
TEST = """
import subprocess, sys
import library
def test():
    library.{name}()
    code = "import library; library.{name}_child()"
    subprocess.run([sys.executable, "-c", code], check=True)
"""


ON_EACH_TRANSPORT = """
import library, pytest
@pytest.mark.parametrize("transport", ["native", "grpcio"])
def test(transport):
    getattr(library, f"on_{transport}")()
"""


def test_only_some_tests_are_measured(tmp_path: Path) -> None:
    """A test in `unit` counts, with the processes that it starts. A test in `faults` does not,
    and the measurement continues after it. A contract test counts on one transport.
    """
    files = {
        "library.py": LIBRARY,
        "pytest.ini": "[pytest]\n",
        "tests/conftest.py": CONFTEST,
        "tests/unit/test_a.py": TEST.format(name="counted"),
        "tests/faults/test_b.py": TEST.format(name="not_counted"),
        "tests/unit/test_c.py": "import library\ndef test(): library.counted_again()\n",
        "tests/contract/test_d.py": ON_EACH_TRANSPORT,
        "setup.cfg": "[coverage:run]\nsource = .\npatch = subprocess\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    order = [name for name in files if "/test_" in name]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"),
            *("--import-mode=importlib", "--cov", "--cov-report=term-missing", *order),
        ],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert "5 passed" in done.stdout, done.stdout + done.stderr
    (missing,) = re.findall(r"^library\.py .*%(.*)$", done.stdout, re.MULTILINE)
    left = [LIBRARY.splitlines()[int(number) - 1] for number in missing.split(",")]
    names = ("not_counted", "not_counted_child", "on_grpcio")
    assert left == [f"    return '{name}'" for name in names]
