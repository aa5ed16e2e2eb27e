"""The lines that the service prints when it serves."""

from pathlib import Path
from typing import Any

import pytest
from latchkey_service.process.greeting import welcome
from latchkey_service.settings.settings import Settings


def greeting(listen: str = "127.0.0.1:50051", tls: str | None = None, **given: Any) -> str:
    settings = Settings(data_dir=Path("/data"), listen=listen, **given)
    return welcome(settings, listen, tls, "data in /data")


def test_it_shows_calls_for_the_plain_case() -> None:
    """The command line comes first, and needs no target at the default address."""
    text = greeting()
    assert "Latchkey serves on 127.0.0.1:50051 (1 worker, data in /data). Press Ctrl-C" in text
    line = next(line for line in text.splitlines() if " create first" in line)
    assert line.endswith("latchkey create first --scope read -a acme")
    assert text.index(line) < text.index("grpcurl -plaintext -d")
    assert text.endswith("    127.0.0.1:50051 latchkey.v1.TokenService/Create\n")


def test_it_shows_how_to_call_under_a_policy() -> None:
    """With a policy, it shows how to become a caller first, and each call presents the
    credential."""
    text = greeting(policy=Path("my policy.toml"))
    assert "policy new-caller me --role manager --output 'my policy.toml' >me.credential)" in text
    assert "--credential-file me.credential" in text
    assert "authorization: Bearer $(cat me.credential)" in text


@pytest.mark.parametrize(
    ("listen", "cli", "grpcurl"),
    [
        ("127.0.0.1:7", "--target 127.0.0.1:7", "    127.0.0.1:7 latchkey"),
        ("0.0.0.0:7", "--target 127.0.0.1:7", "    127.0.0.1:7 latchkey"),
        ("unix:/run/l.sock", "--target unix:/run/l.sock", "    -unix /run/l.sock latchkey"),
    ],
)
def test_it_shows_an_address_that_can_be_called(listen: str, cli: str, grpcurl: str) -> None:
    """A wildcard address is not a target, and grpcurl writes UNIX sockets in its own way."""
    text = greeting(listen, reflection="on")
    assert cli in text
    assert grpcurl in text


def test_it_shows_no_call_that_would_fail() -> None:
    """Where reflection is off, grpcurl would need the contract, so its line is left out."""
    text = greeting(reflection="off", tls="localhost:50052")
    assert "grpcurl" not in text
    assert "With TLS it serves on localhost:50052." in text
