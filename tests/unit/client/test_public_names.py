"""What the package promises by its names."""

import inspect
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import latchkey
from latchkey import _retry, guards
from latchkey_proto.v1 import token_service_pb2


def test_public_names_are_pinned() -> None:
    """No public name comes or goes without this list being changed on purpose."""
    assert latchkey.__all__ == [
        "AlreadyExists",
        "Client",
        "CreatedToken",
        "DeadlineExceeded",
        "FieldViolation",
        "InternalError",
        "InvalidArgument",
        "LatchkeyError",
        "NotFound",
        "Page",
        "PermissionDenied",
        "Receipt",
        "ResourceExhausted",
        "Scope",
        "Secret",
        "Token",
        "Unauthenticated",
        "Unavailable",
        "UnexpectedStatus",
        "Verdict",
        "Verification",
        "Verifier",
        "__version__",
    ]
    assert latchkey.__all__ == sorted(latchkey.__all__)
    assert all(hasattr(latchkey, name) for name in latchkey.__all__)
    assert guards.__all__ == ["current_token"]


def rpc_names() -> list[str]:
    service = token_service_pb2.DESCRIPTOR.services_by_name["TokenService"]
    # A stream is not a call that a client method could stand for one to one.
    return [m.name for m in service.methods if not (m.client_streaming or m.server_streaming)]


def test_no_rpc_lacks_a_client_method() -> None:
    """Every RPC of TokenService has a documented coroutine (or iterator) on Client."""
    assert "BatchVerify" in rpc_names()
    for name in rpc_names():
        method = getattr(latchkey.Client, re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower())
        assert inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method), name
        assert method.__doc__, name
        assert "timeout_seconds" in inspect.signature(method).parameters, name


def test_no_rpc_lacks_a_policy() -> None:
    """Every RPC has a deadline, and only what the contract calls safe is tried again."""
    assert set(_retry.POLICIES) == set(rpc_names())
    assert {name for name, policy in _retry.POLICIES.items() if not policy.retry} == {"Create"}
    assert all(policy.timeout_seconds > 0 for policy in _retry.POLICIES.values())


def test_enums_cover_the_contract() -> None:
    """Every scope and verdict of the contract has its name on this side."""
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
        "import latchkey.guards.asgi\n"
        "assert 'latchkey.guards.grpc' not in sys.modules\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'starlette', 'httpx', 'latchkey_service', 'pydantic'}, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_package_is_typed_and_versioned() -> None:
    """Type checkers use the annotations, and the version is the installed one."""
    assert (Path(latchkey.__file__).parent / "py.typed").exists()
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", latchkey.__version__)
