"""Generate the Python stubs and the descriptor set, or check the committed ones.

The stubs live in their own package, `latchkey_proto`, so that service and client library can share
them without depending on each other, and so that the client library can be called `latchkey`.
protoc derives import paths from the .proto's path, hence the one rewrite below.

The descriptor set describes the contract with its comments, for reflection and for tools such as
grpcurl. It includes the types of google.rpc, so that these tools can print error details.

    python proto/generate.py          write proto/latchkey_proto/
    python proto/generate.py --check  exit 1 when that would change a file
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import google.rpc
import grpc_tools
from google.protobuf import descriptor_pb2

ROOT = Path(__file__).parent
OUT = ROOT / "latchkey_proto"
WELL_KNOWN = Path(grpc_tools.__file__).parent / "_proto"
DESCRIPTORS = Path("latchkey.binpb")
GOOGLE_RPC = Path(next(iter(google.rpc.__path__)))
ERROR_DETAILS = ("google/rpc/status.proto", "google/rpc/error_details.proto")
DOC = '"""Generated from proto/latchkey; `make proto` writes it."""\n'


def generate() -> dict[Path, bytes]:
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
            path.relative_to(base): rewrite(path.read_text()).encode()
            for path in base.rglob("*")
            if path.is_file()
        }
    for package in {Path(), *(path.parent for path in files)}:
        files[package / "__init__.py"] = DOC.encode()
    files[Path("py.typed")] = b""
    files[DESCRIPTORS] = descriptors(protos)
    return files


def descriptors(protos: list[str]) -> bytes:
    """Return the descriptor set of `protos`, their imports and the types of error details.

    Positions in the source are kept only where they carry a comment, which is what tools print.
    """
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp) / DESCRIPTORS
        subprocess.run(  # noqa: S603 - fixed arguments
            [
                *(sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", f"-I{WELL_KNOWN}"),
                f"-I{GOOGLE_RPC.parent.parent}",
                *("--include_imports", "--include_source_info"),
                *(f"--descriptor_set_out={out}", *protos, *ERROR_DETAILS),
            ],
            check=True,
        )
        found = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    for file in found.file:
        commented = [
            location
            for location in file.source_code_info.location
            if location.leading_comments or location.trailing_comments
        ]
        del file.source_code_info.location[:]
        file.source_code_info.location.extend(commented)
    return found.SerializeToString(deterministic=True)


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
            if path not in files or path not in present or (OUT / path).read_bytes() != files[path]
        )
        for path in stale:
            print(f"stub differs from its .proto: proto/latchkey_proto/{path}; run make proto")  # noqa: T201
        return 1 if stale else 0
    for path in present - set(files):
        (OUT / path).unlink()
    for path, content in files.items():
        (OUT / path).parent.mkdir(parents=True, exist_ok=True)
        (OUT / path).write_bytes(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
