"""Options may stand before or after the command."""

import pytest
from latchkey_cli.placing import long_option_with_one_dash, placed


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("list -a x", "list -a x"),
        ("list --tls-ca ca.pem -a x", "--tls-ca ca.pem list -a x"),
        ("list --tls-ca=ca.pem -a x", "--tls-ca=ca.pem list -a x"),
        ("--target h:1 list -a x", "list -a x --target h:1"),
        ("--target=h:1 --tls-key k list", "--tls-key k list --target=h:1"),
        ("list --target h:1 -a x", "list --target h:1 -a x"),
        ("--credential-file c list", "--credential-file c list"),
        ("delete -a x -- --tls-ca id", "delete -a x -- --tls-ca id"),
        ("--target h:1 delete -a x -- --target", "delete -a x --target h:1 -- --target"),
        ("list -a x --tls-ca", "--tls-ca"),
        ("list --target", "list --target"),
        ("--target", "--target"),
        ("", ""),
    ],
)
def test_options_are_moved_to_their_place(given: str, expected: str) -> None:
    """Access options go before the command and --target behind it, with their values."""
    assert placed(given.split()) == expected.split()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("list -account x", "--account"),
        ("list -account=x", "--account"),
        ("list -a x", None),
        ("list -ax", None),
        ("list --account x", None),
        ("delete -- -account", None),
        ("create -json-x", None),
    ],
)
def test_long_options_with_one_dash_are_recognised(given: str, meant: str | None) -> None:
    """`-account` would be taken for `-a ccount`."""
    assert long_option_with_one_dash(given.split(), lambda: {"--account", "--json"}) == meant
