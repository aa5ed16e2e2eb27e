"""A caller's credential never shows in what people print, inspect, copy or pickle."""

import copy
import inspect
import json
import os
import pickle
import pydoc
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import latchkey
import pytest
from latchkey import guards, sync
from latchkey.guards import asgi
from latchkey.guards import grpc as grpc_guard

from tests.helpers.callers import credential, dns_identity

CREDENTIAL = credential("canary")
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (latchkey, sync, guards, asgi, grpc_guard)
    for name in module.__all__
    if name != "__version__"
}


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATCHKEY_CREDENTIAL", CREDENTIAL)


def assert_hidden(text: str) -> None:
    assert CREDENTIAL[4:-6] not in text


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_help_and_signatures(name: str) -> None:
    """`help` and `inspect.signature` of every public name print nothing of the environment."""
    public = PUBLIC[name]
    assert_hidden(pydoc.render_doc(public))
    members = [public, *vars(public).values()] if inspect.isclass(public) else [public]
    for member in members:
        function = getattr(member, "__func__", member)
        if callable(function):
            try:
                signature = inspect.signature(function)
            except (TypeError, ValueError):
                continue
            assert_hidden(str(signature))
            assert not any(p.default is os.environ for p in signature.parameters.values())


async def test_objects_that_hold_a_credential() -> None:
    """The repr, the attributes, a copy and a pickle of everything that holds a credential hide
    it, at any depth."""
    access = latchkey.Access.from_environment()
    assert dict(access.metadata())["authorization"] == f"Bearer {CREDENTIAL}"
    async with latchkey.Client("127.0.0.1:1", access=access) as client:
        holders: list[Any] = [access, client, latchkey.Verifier(client), sync.Verifier()]
        seen: set[int] = set()
        while holders:
            holder = holders.pop()
            if id(holder) in seen:
                continue
            seen.add(id(holder))
            assert_hidden(repr(holder) + str(holder))
            attributes = vars(holder) if hasattr(holder, "__dict__") else {}
            assert_hidden(repr(attributes))
            holders += [value for value in attributes.values() if _is_ours(value)]
    assert_hidden(json.dumps(vars(access), default=repr))
    with pytest.raises(TypeError):
        pickle.dumps(access)
    assert_hidden(repr(vars(copy.copy(access))) + repr(copy.deepcopy(access)))


def _is_ours(value: object) -> bool:
    return type(value).__module__.startswith("latchkey")


@pytest.mark.parametrize(
    "given",
    [CREDENTIAL + "x", CREDENTIAL[:-1], CREDENTIAL[:-1] + "é"],
    ids=["longer", "shorter", "other"],
)
@pytest.mark.parametrize("source", ["argument", "environment", "file"])
def test_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str, source: str) -> None:
    """A rejected credential, which may be a mistyped one, is neither in the traceback nor in a
    local variable of the library, which error reporters collect."""
    path = tmp_path / "credential"
    path.write_text(given)
    monkeypatch.delenv("LATCHKEY_CREDENTIAL")
    if source == "environment":
        monkeypatch.setenv("LATCHKEY_CREDENTIAL", given)
    makers: dict[str, Callable[[], latchkey.Access]] = {
        "argument": partial(latchkey.Access, credential=given),
        "environment": latchkey.Access.from_environment,
        "file": partial(latchkey.Access, credential_file=path),
    }
    with pytest.raises(latchkey.AccessError) as caught:
        makers[source]()
    frames = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    # Without the frame of this test, which knows it.
    del frames.stack[0]
    assert_hidden("".join(frames.format()))
    assert_hidden("".join(traceback.format_exception(caught.value)))


def test_a_target_without_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal to send a credential unencrypted does not contain it."""
    with pytest.raises(latchkey.AccessError) as caught:
        latchkey.Client("example.org:443")
    frames = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    assert_hidden("".join(frames.format()))


@pytest.mark.parametrize(
    "names", [("key", "key"), ("certificate", "other"), ("key", "certificate")]
)
def test_errors_about_keys(tmp_path: Path, names: tuple[str, str]) -> None:
    """An error about TLS files shows no private key, even if it was given as the certificate."""
    own, other = dns_identity("shop.internal"), dns_identity("other.internal")
    contents = {"certificate": own.certificate, "key": own.key, "other": other.key}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    certificate, key = (tmp_path / name for name in names)
    with pytest.raises(latchkey.AccessError) as caught:
        latchkey.Access(tls_certificate=certificate, tls_key=key)
    frames = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    del frames.stack[0]
    shown = "".join(frames.format())
    for secret in (own.key, other.key):
        assert secret.decode().splitlines()[1] not in shown
