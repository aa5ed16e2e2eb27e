"""Commands whose help shows flags without a value.

typer prints a type beside every option. `--yes <bool>` looks as if it took a value, but the next
word on the command line is a separate argument. typer has no setting for this on its built-in
options such as --help, so these classes clear the type of every flag.
"""

from typing import Any

from typer.core import TyperCommand, TyperGroup, TyperOption

__all__ = ["Command", "Group"]


class Command(TyperCommand):
    """A command with plain flags."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the command's parameters."""
        return _with_plain_flags(super().get_params(ctx))


class Group(TyperGroup):
    """The group of all commands, with plain flags."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters that precede the command."""
        return _with_plain_flags(super().get_params(ctx))


def _with_plain_flags(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if isinstance(parameter, TyperOption) and parameter.is_flag:
            parameter.metavar = ""
    return parameters
