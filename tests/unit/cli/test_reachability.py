"""Which addresses of a target accept connections."""

import socket
from typing import Any, NoReturn

import pytest
from latchkey_cli import reachability


def test_only_accepting_addresses_of_a_name_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a name with two addresses, the one that accepts connections is found."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as refusing:
        port = server.getsockname()[1]
        # Bound but not listening, so that no other process takes the address.
        refusing.bind(("127.0.0.2", port))

        def resolve(host: str, number: int, **_: Any) -> list[Any]:
            assert (host, number) == ("demo.internal", port)
            return [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
                for address in ("127.0.0.2", "127.0.0.1")
            ]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        for target in (f"demo.internal:{port}", f"dns:///demo.internal:{port}"):
            assert reachability.listening(target) == [f"ipv4:127.0.0.1:{port}"]


@pytest.mark.parametrize(
    "target",
    ["unix:/tmp/x", "127.0.0.1:1", "ipv4:[::1]:1,[::1]:2", "x", "x:y", "", "a/b:1"],
)
def test_other_targets_have_no_such_address(target: str) -> None:
    """Only a name can hide one address behind another."""
    assert reachability.listening(target) == []


def test_names_that_explain_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a name is unknown or has many addresses, no address matters more than the others."""

    def unknown(*_: Any, **__: Any) -> NoReturn:
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert reachability.listening("demo.internal:1") == []
    many = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 1))] * 5
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: many)
    assert reachability.listening("demo.internal:1") == []


def test_address_of_ipv6_is_found() -> None:
    """An address of IPv6 is returned in gRPC's form."""
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        port = server.getsockname()[1]
        assert reachability.listening(f"[::1]:{port}") == [f"ipv6:[::1]:{port}"]
