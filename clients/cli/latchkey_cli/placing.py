"""Lets people give options where they expect them, before or after the command.

The access options belong to the group and --target to the commands. This module moves each to its
place before the arguments are parsed, and recognises long options with a single dash.
"""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Final

__all__ = ["long_option_with_one_dash", "placed"]

_BEFORE: Final = ("--tls-ca", "--tls-certificate", "--tls-key", "--credential-file")
_AFTER: Final = ("--target",)


def placed(arguments: Sequence[str]) -> list[str]:
    """Return `arguments` with each option of `_BEFORE` first, and each of `_AFTER` at the end.

    Options after "--" are not options, and stay. If an option lacks its value, returns what the
    parser reports best.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    before: list[str] = []
    middle: list[str] = []
    after: list[str] = []
    command = False
    position = 0
    while position < end:
        argument = arguments[position]
        name, separator, _ = argument.partition("=")
        taken = 1 if separator else 2
        group = before if name in _BEFORE else after if name in _AFTER else None
        if group is before and position + taken > end:
            # In its place it would take the command for its value.
            return [argument]
        if group is None or position + taken > end or (group is after and command):
            command = command or not argument.startswith("-")
            middle.append(argument)
            position += 1
            continue
        group += arguments[position : position + taken]
        position += taken
    # Without a command, an option of the commands stays, so that the parser reports it.
    return [*before, *middle, *after, *arguments[end:]]


def long_option_with_one_dash(
    arguments: Sequence[str], known: Callable[[], Collection[str]]
) -> str | None:
    """Return the option that `-account` was meant to be (`--account`), or None.

    The parser would take it for `-a ccount`, and report something else. `known` returns all long
    options. It is called only if an argument looks like one, because it builds all commands.
    """
    for argument in arguments:
        if argument == "--":
            return None
        match = re.fullmatch(r"-([a-z][a-z-]+)(?:=.*)?", argument, re.DOTALL)
        if match is not None and f"--{match[1]}" in known():
            return f"--{match[1]}"
    return None
