"""Commands whose help shows a flag as a flag.

typer shows a type beside every option. `--yes <bool>` reads as if it took a value, but what stands
there on the command line is the next argument. Its own options, such as --help, have no setting
for that; so it is set for all of them, where their commands give them.
"""

from typing import Any

from typer.core import TyperCommand, TyperGroup, TyperOption

__all__ = ["Command", "Group"]


class Command(TyperCommand):
    """A command of the tool."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return what the command takes."""
        return _with_plain_flags(super().get_params(ctx))


class Group(TyperGroup):
    """The tool, which has the commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return what stands before the command."""
        return _with_plain_flags(super().get_params(ctx))


def _with_plain_flags(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if isinstance(parameter, TyperOption) and parameter.is_flag:
            parameter.metavar = ""
    return parameters
