"""Fixtures for the tests of the command line."""

import functools
from collections.abc import Iterator

import pytest
import typer


@pytest.fixture(autouse=True, scope="package")
def one_parser() -> Iterator[None]:
    """Make the parser of all commands once, not for each command that a test runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield
