"""Which addresses of a target accept connections."""

import socket
from typing import Any

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
