"""Generate the Python stubs, or check that the committed ones match the .proto files.

The stubs live in their own package, `latchkey_proto`, so that service and client library can share
them without depending on each other, and so that the client library can be called `latchkey`.
protoc derives import paths from the .proto's path, hence the one rewrite below.

    python proto/generate.py          write proto/latchkey_proto/
    python proto/generate.py --check  exit 1 when that would change a file
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import grpc_tools

ROOT = Path(__file__).parent
OUT = ROOT / "latchkey_proto"
WELL_KNOWN = Path(grpc_tools.__file__).parent / "_proto"
DOC = '"""Generated from proto/latchkey; `make proto` writes it."""\n'


def generate() -> dict[Path, str]:
    """Return the generated files by path relative to OUT."""
    protos = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("latchkey/**/*.proto"))
    with tempfile.TemporaryDirectory() as tmp:
        outs = [f"--{kind}_out={tmp}" for kind in ("python", "grpc_python")]
        outs += [f"--{kind}_out=quiet:{tmp}" for kind in ("mypy", "mypy_grpc")]
        subprocess.run(  # noqa: S603 - fixed arguments
            [
                *(sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", f"-I{WELL_KNOWN}"),
                *outs,
                *protos,
            ],
            check=True,
        )
        base = Path(tmp) / "latchkey"
        files = {
            path.relative_to(base): rewrite(path.read_text())
            for path in base.rglob("*")
            if path.is_file()
        }
    for package in {Path(), *(path.parent for path in files)}:
        files[package / "__init__.py"] = DOC
    files[Path("py.typed")] = ""
    return files


def rewrite(text: str) -> str:
    """Change imports of latchkey.* to latchkey_proto.*, and no others."""
    text = re.sub(
        r"^from latchkey\.(\S+) import", r"from latchkey_proto.\1 import", text, flags=re.MULTILINE
    )
    text = re.sub(r"^import latchkey\.", "import latchkey_proto.", text, flags=re.MULTILINE)
    return re.sub(r"\blatchkey\.(v\d+\.\w+_pb2)\b", r"latchkey_proto.\1", text)


def main() -> int:
    """Write or check the stubs, as the arguments say."""
    files = generate()
    present = {
        path.relative_to(OUT)
        for path in OUT.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    if "--check" in sys.argv:
        stale = sorted(
            str(path)
            for path in present | set(files)
            if path not in files or path not in present or (OUT / path).read_text() != files[path]
        )
        for path in stale:
            print(f"stub differs from its .proto: proto/latchkey_proto/{path}; run make proto")  # noqa: T201
        return 1 if stale else 0
    for path in present - set(files):
        (OUT / path).unlink()
    for path, text in files.items():
        (OUT / path).parent.mkdir(parents=True, exist_ok=True)
        (OUT / path).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
