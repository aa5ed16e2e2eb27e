"""Results of the checks of `latchkey doctor`. Pure."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "State", "failure", "ok", "skipped", "split", "warning"]

State = Literal["ok", "warning", "failure", "skipped"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found. The texts contain no secret."""

    check: str
    state: State
    text: str
    what_to_do: str = ""


def ok(check: str, text: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding(check, "ok", text)


def warning(check: str, text: str, what_to_do: str) -> Finding:
    """Return a finding that allows the service to work."""
    return Finding(check, "warning", text, what_to_do)


def failure(check: str, text: str, what_to_do: str = "") -> Finding:
    """Return a finding that keeps the service from working, or from working safely."""
    return Finding(check, "failure", text, what_to_do)


def skipped(check: str, reason: str) -> Finding:
    """Return a finding about a check that could not run, or has nothing to check."""
    return Finding(check, "skipped", reason)


def split(make: Callable[[str, str, str], Finding], check: str, sentence: str) -> Finding:
    """Make a finding from a sentence whose part after the last semicolon says what to do."""
    text, _, remedy = sentence.rpartition("; ")
    return make(check, text or remedy, remedy if text else "")
