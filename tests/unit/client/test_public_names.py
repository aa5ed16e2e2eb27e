"""The public names of the package."""

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import latchkey
import pytest
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from latchkey import _retry, guards, sync
from latchkey_proto import v1
from latchkey_proto.v1 import token_service_pb2

from tests.helpers.repository import ROOT


def test_public_names_are_pinned() -> None:
    """Public names change only together with this list."""
    assert latchkey.__all__ == [
        "Access",
        "AccessError",
        "AlreadyExists",
        "AuditEntry",
        "AuditFilter",
        "AuditPage",
        "CallerUsage",
        "Change",
        "Client",
        "CreatedToken",
        "DeadlineExceeded",
        "Deletions",
        "FailedPrecondition",
        "FieldViolation",
        "FoundPage",
        "FoundToken",
        "ImportOutcome",
        "ImportResult",
        "ImportedToken",
        "InternalError",
        "InvalidArgument",
        "LatchkeyError",
        "Limits",
        "NotFound",
        "Notifications",
        "Outcome",
        "Page",
        "PermissionDenied",
        "RateLimit",
        "Receipt",
        "ResourceExhausted",
        "Revocation",
        "RotatedToken",
        "Scope",
        "Secret",
        "SecretOutcome",
        "Status",
        "Token",
        "TokenFilter",
        "TokenOrder",
        "TokenSecret",
        "TokenState",
        "Unauthenticated",
        "Unavailable",
        "Unchanged",
        "UnexpectedStatus",
        "Verdict",
        "Verification",
        "Verifier",
        "VerifierStats",
        "VerifierStatus",
        "__version__",
        "current_person",
    ]
    assert latchkey.__all__ == sorted(latchkey.__all__)
    assert all(hasattr(latchkey, name) for name in latchkey.__all__)
    assert guards.__all__ == ["current_token", "current_token_or_none"]
    assert sync.__all__ == ["Client", "Verifier", "ignore_idle_poller"]


def services() -> list[ServiceDescriptor]:
    """Return every service of the contract, from the generated modules."""
    modules = [
        importlib.import_module(f"{v1.__name__}.{module.name}")
        for module in pkgutil.iter_modules(v1.__path__)
        if module.name.endswith("_pb2")
    ]
    return [s for module in modules for s in module.DESCRIPTOR.services_by_name.values()]


def methods() -> list[MethodDescriptor]:
    return [method for service in services() for method in service.methods]


def rpc_names() -> list[str]:
    # A stream has no corresponding client method.
    return [
        # Two services have a method named List.
        m.full_name.removeprefix("latchkey.v1.") if "AuditService" in m.full_name else m.name
        for m in methods()
        if not (m.client_streaming or m.server_streaming)
    ]


def test_services_are_those_of_the_contract() -> None:
    """The tests below see every service that a .proto file declares."""
    declared = [
        name
        for path in ROOT.glob("proto/latchkey/**/*.proto")
        for name in re.findall(r"^service (\w+)", path.read_text("utf-8"), re.MULTILINE)
    ]
    assert sorted(declared) == sorted(service.name for service in services())
    assert "TokenService" in declared


def test_every_rpc_has_a_client_method() -> None:
    """Client has a documented coroutine or iterator for every unary RPC."""
    assert {"BatchVerify", "GetStatus", "InvalidateAll"} <= set(rpc_names())
    for name in rpc_names():
        snake = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
        ours = {
            "get_status": "status",
            "audit_service._list": "audit_page",
            "revoke_secret": "revoke_secrets",
            "report_secret": "report_secrets",
            "import": "import_tokens",
        }.get(snake, snake)
        method = getattr(latchkey.Client, ours)
        assert inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method), name
        assert method.__doc__, name
        assert "timeout_seconds" in inspect.signature(method).parameters, name


def test_watch_is_the_only_stream() -> None:
    """The contract has one stream, Watch, which every verifier uses."""
    assert [m.name for m in methods() if m.client_streaming or m.server_streaming] == ["Watch"]
    assert inspect.signature(latchkey.Verifier).parameters["cache_entries"].default > 0


def test_sync_verifies_like_async() -> None:
    """Both verifiers have the same arguments and methods, apart from awaiting."""
    for name in ("verify", "verify_nowait", "stats", "close"):
        signatures = [
            inspect.signature(getattr(cls, name)) for cls in (latchkey.Verifier, sync.Verifier)
        ]
        assert signatures[0] == signatures[1]
        assert getattr(sync.Verifier, name).__doc__


def test_sync_client_has_every_method() -> None:
    """Both clients have the same methods with the same arguments, apart from awaiting."""
    for name, method in inspect.getmembers(latchkey.Client, inspect.isfunction):
        if name.startswith("_") or name in ("metadata", "open_channel"):
            continue
        blocking = getattr(sync.Client, name)
        assert not inspect.iscoroutinefunction(blocking), name
        ours, theirs = inspect.signature(blocking), inspect.signature(method)
        assert ours.parameters == theirs.parameters, name
        assert blocking.__doc__, name


def test_every_rpc_has_a_policy() -> None:
    """Every RPC has a deadline."""
    assert set(_retry.TIMEOUTS_SECONDS) == set(rpc_names())
    assert all(seconds > 0 for seconds in _retry.TIMEOUTS_SECONDS.values())


def test_every_rpc_is_safe_to_retry() -> None:
    """All RPCs are retried, and the contract says of each that this is safe."""
    described = {
        name: " ".join(comment.replace("//", "").split())
        for path in ROOT.glob("proto/latchkey/**/*.proto")
        for comment, name in re.findall(
            r"((?:^  //.*\n)+)^  rpc (\w+)\((?!stream)", path.read_text("utf-8"), re.MULTILINE
        )
    }
    assert {name.rpartition(".")[2] for name in rpc_names()} == set(described)
    safe = re.compile(
        r"safe to re(try|peat)|retry( within a day)? is safe|idempotent\.|idempotent:",
        re.IGNORECASE,
    )
    for name, comment in described.items():
        assert safe.search(comment), name


def test_enums_cover_the_contract() -> None:
    """The library has a member for every scope and verdict of the contract."""
    pairs: Mapping[str, list[str]] = {
        "SCOPE_": [scope.name for scope in latchkey.Scope],
        "VERDICT_": [verdict.name for verdict in latchkey.Verdict],
    }
    for (prefix, names), kind in zip(
        pairs.items(), (token_service_pb2.Scope, token_service_pb2.Verdict), strict=True
    ):
        assert {prefix + name for name in names} == set(kind.keys())


def test_import_stays_light() -> None:
    """Importing latchkey imports no guard, and importing the guards needs no web framework."""
    code = (
        "import sys, latchkey\n"
        "assert 'latchkey.guards' not in sys.modules\n"
        "assert 'latchkey.sync' not in sys.modules\n"
        "import latchkey.guards.asgi\n"
        "assert 'latchkey.guards.grpc' not in sys.modules\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'starlette', 'httpx', 'latchkey_service', 'pydantic'}, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_package_is_typed_and_versioned() -> None:
    """The package ships type annotations, and reports its installed version."""
    assert (Path(latchkey.__file__).parent / "py.typed").exists()
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", latchkey.__version__)


@pytest.mark.parametrize(
    ("guard", "framework"),
    [("fastapi", "fastapi"), ("django", "django"), ("drf", "rest_framework"), ("drf", "django")],
)
def test_a_guard_without_its_framework_says_what_to_install(guard: str, framework: str) -> None:
    """The import of a guard whose framework is missing fails with one clear sentence, and the other
    guards need no framework."""
    program = f"""
import sys
sys.modules[{framework!r}] = None
import latchkey.guards.asgi, latchkey.guards.wsgi
import latchkey.guards.grpc, latchkey.guards.grpc_sync
try:
    import latchkey.guards.{guard}
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stderr == ""
    assert re.search(r"which is not installed: pip install \w+\n$", done.stdout)
